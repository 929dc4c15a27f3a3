"""Pages of a step on a GPU: the kernels of decode over an engine's records and rings. Nothing waits for the device.

What decode keeps between its kernels grows with sequences times the longest of them that there may be: more than a model's
activations. So sequences are attended some at a time, in the same room, and `rehearse_decode` takes it while the engine
measures how much memory is left for pages.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.decode import ops
from thrift_attn.decode.gather import gather_pages
from thrift_attn.decode.pack import pack_blocks
from thrift_attn.decode.tensors import MAX_HEADS, CacheTensors, padded_rows
from thrift_attn.reference.budget import decode_budget
from thrift_attn.reference.paged_rows import SharedPages
from thrift_attn.vllm.engine_step import LayerOptions, PromptRow, StepRows, attend_step
from thrift_attn.vllm.page_record import PageRecord

ROOM = 256 * 2**20
"""Bytes for what the sequences that are attended at a time keep between kernels; so many fill a GPU several times over."""


def rows_at_once(kv_heads: int, group: int, most: int, blocks: int, head_dim: int) -> int:
    """Sequences that are attended at a time, so that what they keep between kernels fits `ROOM`; at least one.

    Args:
        kv_heads: Hkv.
        group: query heads of each.
        most: the most queries of a sequence.
        blocks: NB, entries of a page table for one sequence.
        head_dim: D.
    """
    rows = padded_rows(group, most)
    words = blocks * (rows + 3) + rows * (head_dim + 1)  # bias, scores, two lists; the output of a split and its LSE
    found = max(1, min(ROOM // (4 * words * kv_heads), MAX_HEADS // kv_heads))
    return found if found < 4 else found // 4 * 4  # what is cut off starts at a multiple of 16 bytes, as all of it does


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
        run: what stands for this run of the model, see `StepRows.before`.
    """

    def __init__(self, layer: KernelLayer, rows: StepRows, rings: Tensor, run: object):
        self._of, self._rows, self._rings = layer, rows, rings
        self._options = layer.options
        count = rows.decoding
        self._starts = rows.starts[: count + 1]
        self._decoding = None
        if count:
            self._decoding = layer.tensors(rows.page_table[:count], rings[:count], rows.before(run).clone())

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
        cache = self._decoding
        assert cache is not None
        heads, count = cache.kv_heads, len(cache.lengths)
        at_once = rows_at_once(heads, q.shape[1] // heads, self._rows.most, cache.max_blocks, q.shape[2])
        for first in range(0, count, at_once):
            self._attend_some(q, out, cache, slice(first, min(first + at_once, count)))

    def _attend_some(self, q: Tensor, out: Tensor, cache: CacheTensors, some: slice) -> None:
        """Attend with some of the sequences; what is kept between kernels is gone when this returns."""
        options = self._options
        lengths, rings, page_table = cache.lengths[some], cache.rings[some], cache.page_table[some]
        step = ops.begin_step(
            q, replace(cache, lengths=lengths, rings=rings, page_table=page_table), options.pages,
            scale=options.scale, softcap=options.softcap, starts=self._starts[some.start : some.stop + 1],
            most=self._rows.most, out=out,
        )  # fmt: skip
        for launch in ops.step_kernels(step).values():
            launch()

    def tile(self, prompt: PromptRow, blocks: range) -> tuple[Tensor, Tensor]:
        """See `StepPages`."""
        rings, tokens = self._of.layer.rings, len(blocks) * BLOCK
        k, v = torch.empty(2, 1, rings.shape[2], tokens, rings.shape[4], dtype=rings.dtype, device=rings.device)
        cache = self._cache_of(prompt, prompt.complete * BLOCK)
        gather_pages(k, v, cache=cache, numerics=self._options.pages, tokens=tokens, start=blocks.start * BLOCK)
        return k[0], v[0]


def rehearse_decode(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, record: PageRecord, layer: LayerOptions, budget: Tensor,
    sequences: int, block_tokens: int, most: int,
) -> None:  # fmt: skip
    """Run a step of as many sequences as there may be, none of which brings a token: it takes the memory of any step.

    So the engine measures it, and the kernels are there before the first request. They read and write nothing.

    Args:
        q: ``[tokens, Hq, D]``, those of no sequence.
        k: ``[tokens, Hkv, D]``.
        v: likewise.
        out: the shape of ``q``; stays as it is.
        record: where things lie in a page.
        layer: what is computed.
        budget: `step_budget`, whose length says how many blocks a sequence may have.
        sequences: most sequences of a step.
        block_tokens: of the engine's blocks, one of which is a ring.
        most: the most tokens of one that decodes.
    """
    heads, per_block = k.shape[1], block_tokens // BLOCK
    page, ring = (
        torch.zeros(1, heads, tokens, record.token_bytes, dtype=torch.uint8, device=q.device)
        for tokens in (BLOCK, block_tokens)
    )
    scales = None, None
    if layer.pages.channel_scales:
        scales = torch.ones(heads, q.shape[2], device=q.device), torch.ones(heads, device=q.device)
    pool = SharedPages(*record.pages(page, q.dtype), record.rings(ring, q.dtype), *scales)
    nothing = torch.zeros(sequences + 1, dtype=torch.int32, device=q.device)
    width = -(-(len(budget) - 2) // per_block) * per_block
    rows = StepRows(
        starts=nothing, lengths=nothing[:-1], page_table=nothing.new_zeros(sequences, width), decoding=sequences, most=most,
        prompts=[],
    )  # fmt: skip
    pages = KernelPages(KernelLayer(pool, layer, budget), rows, nothing[:-1], rows)
    attend_step(q, k, v, out, rows=rows, pages=pages, options=layer)
