"""The cache's kernels as torch.library operators, so that they trace, compile and capture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.decode.append import write_tail
from thrift_attn.decode.attend import attend_pages, choose_splits, column_tile, tuning
from thrift_attn.decode.combine_splits import Sink, merge_splits, padded_rows
from thrift_attn.decode.pack import pack_blocks
from thrift_attn.decode.select import score_blocks, select_blocks
from thrift_attn.dispatch import multiprocessors, overlaps

OVERLAPPED_BLOCKS = 2**14
"""Blocks of all sequences and KV heads up to which the kernels of a step overlap: in larger steps more is lost than the latency
that is saved (docs/log.md)."""


def _overlap(base: Tensor, page_table: Tensor) -> bool:
    """Whether the kernels of a step over these pages start while the one before them ends."""
    return overlaps(base.device) and base.shape[1] * page_table.numel() <= OVERLAPPED_BLOCKS


@torch.library.custom_op(
    "thrift_attn::append_step", mutates_args=("tail", "base", "centres", "high", "sinks", "lengths"), device_types=None
)
def append_step(
    k: Tensor,
    v: Tensor,
    tail: Tensor,
    base: Tensor,
    centres: Tensor,
    high: Tensor,
    sinks: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    low: str,
    plane: str,
    centred: bool,
    sink: bool,
    best: bool,
    of_keys: Tensor | None = None,
    of_values: Tensor | None = None,
) -> None:
    """Append T <= 64 tokens to every sequence and pack the blocks that are complete now; ``lengths`` grows by T.

    What is written is K times ``of_keys`` and V times ``of_values`` (`thrift_attn.cache.cache_scales`).
    """
    batch, kv_heads, _, dim = k.shape
    pages, firsts = torch.empty(2, batch, 2, dtype=torch.int32, device=k.device)
    write_tail(k, v, tail, page_table, lengths, pages, firsts, of_keys, of_values)
    blocks = tail.view(2, batch * 2, kv_heads, BLOCK, dim)
    pack_blocks(
        blocks[0], blocks[1], pages.view(-1), base, centres, high,
        low=low, plane=plane, centred=centred, best=best, firsts=firsts.view(-1) if sink else None,
        sinks=sinks if sink else None, overlap=_overlap(base, page_table),
    )  # fmt: skip


@append_step.register_fake
def _(k, v, tail, base, centres, high, sinks, page_table, lengths, low, plane, centred, sink, best, of_keys=None,
      of_values=None):  # fmt: skip
    return None


def step_kernels(
    q: Tensor,
    base: Tensor,
    centres: Tensor,
    high: Tensor,
    tail: Tensor,
    sinks: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    budget: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    plane: str,
    centred: bool,
    sink: bool,
    first: int,
    last: int,
    of_queries: Tensor | None = None,
    of_outputs: Tensor | None = None,
) -> tuple[dict[str, Callable[[], None]], Tensor, Tensor]:
    """The kernels of one step by name, in the order in which they run, and the output and LSE that they write."""
    batch, heads, tq, dim = q.shape
    kv_heads, blocks = base.shape[1], page_table.shape[1]
    rows = padded_rows(heads // kv_heads, tq)
    q = q if q.stride(-1) == 1 else q.contiguous()

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    bias, scores = empty(batch, kv_heads, blocks, rows), empty(batch, kv_heads, blocks)
    chosen, counts = (empty(batch, kv_heads, 2, n, dtype=torch.int32) for n in (blocks, 1))
    overlap = _overlap(base, page_table)
    group = heads // kv_heads
    tile = column_tile(group, tq, dim)
    tuned = tuning(dim, tile, tq > 1 or window is not None, plane)
    splits = choose_splits(blocks, batch, kv_heads, rows // tile, multiprocessors(q.device) * tuned.programs)
    parts, part_lse = empty(batch, kv_heads, splits, rows, dim), empty(batch, kv_heads, splits, rows)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), empty(batch, heads, tq)
    kernels = {
        "scores": partial(
            score_blocks, q, centres, page_table, lengths, bias, scores,
            scale=scale, of_queries=of_queries, others=sinks[0] if sink else None, overlap=overlap,
        ),
        "select": partial(
            select_blocks, scores, page_table, lengths, budget, chosen, counts,
            tq=tq, first=first, last=last, window=window, overlap=overlap,
        ),
        "attend": partial(
            attend_pages, q, base, high, tail, bias, chosen, counts, lengths, parts, part_lse,
            scale=scale, of_queries=of_queries, plane=plane, centred=centred, window=window, softcap=softcap,
            tuned=tuned, overlap=overlap,
        ),
        "merge": partial(
            merge_splits, parts, part_lse, out, lse, of_outputs=of_outputs,
            sink=Sink(sinks[1], bias, lengths, window, softcap) if sink else None, overlap=overlap,
        ),
    }  # fmt: skip
    return kernels, out, lse


@torch.library.custom_op("thrift_attn::attend_cache", mutates_args=(), device_types=None)
def attend_cache(
    q: Tensor,
    base: Tensor,
    centres: Tensor,
    high: Tensor,
    tail: Tensor,
    sinks: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    budget: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    plane: str,
    centred: bool,
    sink: bool,
    first: int,
    last: int,
    of_queries: Tensor | None = None,
    of_outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores, selection, attention and merge of the newest tokens over the pages; see `PagedThriftCache.attend`."""
    kernels, out, lse = step_kernels(
        q, base, centres, high, tail, sinks, page_table, lengths, budget,
        scale, window, softcap, plane, centred, sink, first, last, of_queries, of_outputs,
    )  # fmt: skip
    for launch in kernels.values():
        launch()
    return out, lse


@attend_cache.register_fake
def _(q, base, centres, high, tail, sinks, page_table, lengths, budget, scale, window, softcap, plane, centred, sink, first,
      last, of_queries=None, of_outputs=None):  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
