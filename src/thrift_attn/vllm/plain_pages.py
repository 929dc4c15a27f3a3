"""Pages of a step in plain PyTorch, on a CPU."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from thrift_attn.reference.paged_rows import SharedPages, append_row, attend_row, read_row
from thrift_attn.vllm.engine_step import LayerOptions, PromptRow, StepRows


class PlainPages:
    """What the sequences of a step lie in; see `thrift_attn.vllm.engine_step.StepPages`.

    Args:
        layer: pages and rings of the layer.
        rows: the sequences of the step.
        rings: int32 ``[B]``, the ring of each.
        options: what is computed.
    """

    def __init__(self, layer: SharedPages, rows: StepRows, rings: Tensor, options: LayerOptions):
        self._layer, self._options = layer, options
        self._rings, self._pages = rings.tolist(), rows.page_table.long()
        lengths, counts = rows.lengths.tolist(), [last - first for first, last in pairwise(rows.starts.tolist())]
        starts = rows.starts.tolist()
        self._decoding = [
            PromptRow(row, starts[row], counts[row], lengths[row] - counts[row])
            for row in range(rows.decoding)
            if counts[row]
        ]

    def kept(self, prompt: PromptRow) -> Tensor:
        """See `StepPages`."""
        return self._layer.kept(self._rings[prompt.row], prompt.before)

    def append_prompt(self, prompt: PromptRow, k: Tensor, v: Tensor) -> None:
        """See `StepPages`."""
        append_row(
            self._layer, self._pages[prompt.row], self._rings[prompt.row], k.transpose(0, 1), v.transpose(0, 1),
            before=prompt.before, numerics=self._options.pages,
        )  # fmt: skip

    def append_decoding(self, k: Tensor, v: Tensor) -> None:
        """See `StepPages`."""
        for one in self._decoding:
            self.append_prompt(one, k[one.tokens], v[one.tokens])

    def attend_decoding(self, q: Tensor, out: Tensor) -> None:
        """See `StepPages`."""
        for one in self._decoding:
            found, _ = attend_row(
                q[one.tokens].transpose(0, 1), self._layer, self._pages[one.row], self._rings[one.row],
                tokens=one.before + one.count, numerics=self._options.pages, scale=self._options.scale,
                softcap=self._options.softcap,
            )  # fmt: skip
            out[one.tokens] = found.transpose(0, 1)

    def tile(self, prompt: PromptRow, blocks: range) -> tuple[Tensor, Tensor]:
        """See `StepPages`."""
        read, dtype = (
            read_row(self._layer, self._pages[prompt.row], blocks, self._options.pages),
            self._layer.rings.dtype,
        )
        k, v = (x.transpose(0, 1).flatten(1, 2).to(dtype) for x in (read.high_k, read.high_v))
        return k, v
