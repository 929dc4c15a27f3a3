"""Pages of a step on a GPU: the kernels of decode over an engine's records and rings. Nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.decode import ops
from thrift_attn.decode.gather import gather_pages
from thrift_attn.decode.pack import pack_blocks
from thrift_attn.decode.tensors import CacheTensors
from thrift_attn.reference.budget import decode_budget
from thrift_attn.reference.paged_rows import SharedPages
from thrift_attn.vllm.engine_step import LayerOptions, PromptRow, StepRows


def step_budget(options: LayerOptions, max_tokens: int, device: torch.device) -> Tensor:
    """Blocks to promote by complete blocks of a sequence, int32; made before a graph is captured.

    Args:
        options: what is computed.
        max_tokens: of a sequence.
        device: where it is read.
    """
    return decode_budget(options.pages.budget, -(-max_tokens // BLOCK) + 1).to(device)


class KernelLayer:
    """A layer's pages as the kernels take them, and what they need beside them; made once for the blocks of an engine.

    Args:
        layer: pages and rings of the layer.
        options: what is computed.
        budget: int32 ``[NB + 1]`` on the device, blocks to promote by complete blocks (`step_budget`).
    """

    def __init__(self, layer: SharedPages, options: LayerOptions, budget: Tensor):
        self.layer, self.options, self._budget = layer, options, budget
        self._overrun = budget.new_zeros(1)  # never set: an engine has the pages before the tokens

    def tensors(self, page_table: Tensor, rings: Tensor, lengths: Tensor) -> CacheTensors:
        """Return the cache of some sequences.

        Args:
            page_table: int32 ``[B, NB]``.
            rings: int32 ``[B]``.
            lengths: int32 ``[B]``; an append counts its tokens here.
        """
        pool, layer = self.layer.pool, self.layer
        return CacheTensors(
            base=pool.base,
            k_block_mean=pool.k_block_mean,
            high=pool.high,
            tail=layer.rings,
            rings=rings,
            block0_mean=layer.block0_mean,
            sink_value=layer.sink_value,
            page_table=page_table,
            lengths=lengths,
            budget=self._budget,
            overrun=self._overrun,
            k_channel_scale=layer.k_channel_scale,
            v_head_scale=layer.v_head_scale,
            first_in_page=True,
        )


class KernelPages:
    """What the sequences of a step lie in; see `thrift_attn.vllm.engine_step.StepPages`.

    Args:
        layer: the layer.
        rows: the sequences of the step.
        rings: int32 ``[B]``, contiguous, the ring of each.
    """

    def __init__(self, layer: KernelLayer, rows: StepRows, rings: Tensor):
        self._of, self._rows, self._rings = layer, rows, rings
        self._options = layer.options
        count = rows.decoding
        self._starts = rows.starts[: count + 1]
        self._decoding = None
        if count:
            self._decoding = layer.tensors(rows.page_table[:count], rings[:count], rows.before.clone())

    def _ring(self, prompt: PromptRow) -> Tensor:
        """int32 ``[1]`` on the device."""
        return self._rings[prompt.row : prompt.row + 1]

    def kept(self, prompt: PromptRow) -> Tensor:
        """See `StepPages`."""
        rings = self._of.layer.rings
        first = prompt.complete * BLOCK
        at = torch.arange(first, prompt.before, device=rings.device) % rings.shape[3]
        return rings[self._ring(prompt)][0][:, :, at]

    def append_prompt(self, prompt: PromptRow, k: Tensor, v: Tensor) -> None:
        """See `StepPages`."""
        first, complete = prompt.complete, (prompt.before + prompt.count) // BLOCK
        if complete > first:
            self._pack(prompt, range(first, complete), k, v)
        rings = self._of.layer.rings
        newest, end = min(prompt.count, rings.shape[3]), prompt.before + prompt.count
        at = torch.arange(end - newest, end, device=k.device) % rings.shape[3]
        rings[self._ring(prompt), :, :, at] = torch.stack([k, v], 1)[prompt.count - newest :]  # [newest, 2, Hkv, D]

    def _pack(self, prompt: PromptRow, blocks: range, k: Tensor, v: Tensor) -> None:
        """Pack the blocks that a prompt completes from what its ring has of the first one and from new tokens."""
        if prompt.before % BLOCK:
            k, v = (torch.cat([held.transpose(0, 1), new]) for held, new in zip(self.kept(prompt), (k, v), strict=True))
        k, v = (x[: len(blocks) * BLOCK].unflatten(0, (-1, BLOCK)).transpose(1, 2) for x in (k, v))  # [n, Hkv, 64, D]
        pages = self._rows.page_table[prompt.row, blocks.start : blocks.stop]
        numbers = torch.arange(blocks.start, blocks.stop, dtype=torch.int32, device=k.device)
        pack_blocks(
            k, v, pages, cache=self._cache_of(prompt, 0), numerics=self._options.pages,
            seqs=torch.zeros_like(numbers), numbers=numbers,
        )  # fmt: skip

    def _cache_of(self, prompt: PromptRow, tokens: int) -> CacheTensors:
        """The cache of one sequence as it is with so many tokens."""
        table = self._rows.page_table[prompt.row : prompt.row + 1]
        lengths = torch.full((1,), tokens, dtype=torch.int32, device=table.device)
        return self._of.tensors(table, self._ring(prompt), lengths)

    def append_decoding(self, k: Tensor, v: Tensor) -> None:
        """See `StepPages`."""
        assert self._decoding is not None
        ops.append(k, v, self._decoding, self._options.pages, starts=self._starts, most=self._rows.most)

    def attend_decoding(self, q: Tensor, out: Tensor) -> None:
        """See `StepPages`."""
        assert self._decoding is not None
        found, _ = ops.attend(
            q, self._decoding, self._options.pages,
            scale=self._options.scale, softcap=self._options.softcap, starts=self._starts, most=self._rows.most,
        )  # fmt: skip
        out.copy_(found)

    def tile(self, prompt: PromptRow, blocks: range) -> tuple[Tensor, Tensor]:
        """See `StepPages`."""
        rings, tokens = self._of.layer.rings, len(blocks) * BLOCK
        k, v = torch.empty(2, 1, rings.shape[2], tokens, rings.shape[4], dtype=rings.dtype, device=rings.device)
        cache = self._cache_of(prompt, prompt.complete * BLOCK)
        gather_pages(k, v, cache=cache, numerics=self._options.pages, tokens=tokens, start=blocks.start * BLOCK)
        return k[0], v[0]
