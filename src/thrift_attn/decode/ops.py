"""Decode as torch.library operators, so that it traces, compiles and captures: append a step, attend a step.

Their schemas are flat, as torch.library wants it. Everything else takes the bundles of `thrift_attn.decode.tensors`, and
`attend` and `append` take them apart and put them together again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from thrift_attn.config import ThriftConfig
from thrift_attn.decode.append import write_tail
from thrift_attn.decode.attend import a_program_each, attend_pages, choose_splits, column_tile, tuning_each, tuning_of
from thrift_attn.decode.combine_splits import combine_splits
from thrift_attn.decode.pack import pack_tail
from thrift_attn.decode.score import BLOCKS_PER_PROGRAM, score_blocks
from thrift_attn.decode.select import select_blocks
from thrift_attn.decode.tensors import (
    CacheTensors,
    DecodeStep,
    ResidentTensors,
    check_starts,
    padded_queries,
    padded_rows,
    served_one_each,
)
from thrift_attn.dispatch import multiprocessors, overlaps
from thrift_attn.numerics import DecodeNumerics

OVERLAPPED_BLOCKS = 2**14
"""Blocks of all sequences and KV heads up to which the kernels of a step overlap: in larger steps more is lost than the latency
that is saved (docs/log.md)."""


def _overlap(cache: CacheTensors) -> bool:
    """Whether the kernels of a step over these pages start while the one before them ends."""
    return overlaps(cache.base.device) and cache.kv_heads * cache.page_table.numel() <= OVERLAPPED_BLOCKS


def begin_step(
    q: Tensor,
    cache: CacheTensors,
    numerics: DecodeNumerics,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    starts: Tensor | None = None,
    most: int = 1,
    out: Tensor | None = None,
) -> DecodeStep:
    """Return one step of decode with room for what its kernels write; see `DecodeStep` for the arguments.

    Args:
        most: the most queries of a sequence where they are packed, that is, there are ``starts``; the rows of one that has more
            are not computed.
        out: where the output goes; by default a new tensor, in which rows of no sequence are 0.
    """
    check_starts(q, starts, len(cache.lengths))
    q = q if q.stride(-1) == 1 else q.contiguous()
    batch, heads, dim, tq = len(cache.lengths), q.shape[1], q.shape[-1], q.shape[2] if starts is None else most
    kv_heads, blocks, group = cache.kv_heads, cache.max_blocks, heads // cache.kv_heads
    rows, plane = padded_rows(group, tq), numerics.promoted_storage
    sizes, processors = (blocks, batch, kv_heads, rows // column_tile(group, tq, dim)), multiprocessors(q.device)
    each = processors * tuning_each(tq > 1 or window is not None).programs
    one_each = served_one_each(cache, numerics) and a_program_each(*sizes, each)
    splits = choose_splits(*sizes, processors * tuning_of(group, tq, dim, window, plane).programs)
    splits = blocks if one_each else splits

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    if starts is None:
        lse = empty(batch, heads, tq)
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    else:
        lse = empty(len(q), heads).fill_(-torch.inf)
        out = torch.zeros_like(q, memory_format=torch.contiguous_format) if out is None else out
    pooled, scores = cache.residents is not None, empty(batch, kv_heads, blocks)
    return DecodeStep(
        q=q,
        tq=tq,
        starts=starts,
        cache=cache,
        numerics=numerics,
        scale=scale,
        window=window,
        softcap=softcap,
        overlap=_overlap(cache),
        one_each=one_each,
        bias=empty(batch, kv_heads, blocks, rows),
        scores=scores,
        first_scores=empty(batch, kv_heads, blocks if pooled and tq > 1 else 0) if tq > 1 else scores,
        score_lse=empty(batch, kv_heads, -(-blocks // BLOCKS_PER_PROGRAM) if pooled else 0),
        block_indices=empty(batch, kv_heads, 3 if pooled else 2, 0 if one_each else blocks, dtype=torch.int32),
        block_counts=empty(batch, kv_heads, 2, dtype=torch.int32),
        partial_out=empty(batch, kv_heads, splits, rows, dim),
        partial_lse=empty(batch, kv_heads, splits, rows),
        out=out,
        lse=lse,
    )


def step_kernels(step: DecodeStep) -> dict[str, Callable[[], None]]:
    """Return the launches of one step by name, in order: the library runs them, and the benchmark times them."""
    launchers = {"scores": score_blocks, "select": select_blocks, "attend": attend_pages, "merge": combine_splits}
    if step.one_each:
        launchers.pop("select")
    if not step.scored:
        launchers.pop("scores")
    return {name: partial(launch, step) for name, launch in launchers.items()}


# -- operators --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _numerics(storage: str) -> DecodeNumerics:
    """Return the numerics whose `_storage` is given."""
    base_format, promoted_storage, center, sink_token, scales, first, last = storage.split()
    return DecodeNumerics.resolve(
        ThriftConfig.for_cache(
            base_format=base_format,
            promoted_storage=promoted_storage,
            center=center,
            sink_token=sink_token,
            scales=scales,
            force_first=int(first),
            force_last=int(last),
        )
    )


def _storage(numerics: DecodeNumerics) -> str:
    """Return all of ``numerics`` that kernels of decode look at in one word per option: a string passes through a schema."""
    words = (
        numerics.base_format,
        numerics.promoted_storage,
        "block" if numerics.centred else "none",
        "exact" if numerics.exact_sink else "none",
        "best" if numerics.best_scales else "max",
        numerics.force_first,
        numerics.force_last,
    )
    return " ".join(map(str, words))


@torch.library.custom_op(
    "thrift_attn::append_step",
    mutates_args=[
        *("tail", "base", "k_block_mean", "high", "block0_mean", "sink_value", "lengths", "overrun"),
        *("k_channel_scale", "v_head_scale", "slot_of_page", "block_of_slot", "past_mass"),
    ],
    device_types=None,
)
def append_step(
    k: Tensor,
    v: Tensor,
    base: Tensor,
    k_block_mean: Tensor,
    high: Tensor,
    tail: Tensor,
    rings: Tensor,
    block0_mean: Tensor,
    sink_value: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    budget: Tensor,
    overrun: Tensor,
    k_channel_scale: Tensor,
    v_head_scale: Tensor,
    slot_of_page: Tensor,
    block_of_slot: Tensor,
    past_mass: Tensor,
    slots: Tensor,
    bounds: Tensor,
    quota: Tensor,
    storage: str,
    first_in_page: bool,
    counts: Tensor | None = None,
    starts: Tensor | None = None,
    most: int | None = None,
) -> None:
    """`append` with its bundles taken apart."""
    cache = _bundle(
        first_in_page, base, k_block_mean, high, tail, rings, block0_mean, sink_value, page_table, lengths, budget, overrun,
        k_channel_scale, v_head_scale, slot_of_page, block_of_slot, past_mass, slots, bounds, quota,
    )  # fmt: skip
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    batch, kv_heads = len(lengths), k.shape[1]
    pages, numbers = torch.empty(2, batch, dtype=torch.int32, device=k.device)
    taken = None if cache.residents is None else pages.new_empty(batch, kv_heads)
    write_tail(k, v, cache=cache, pages=pages, numbers=numbers, slots=taken, counts=counts, starts=starts, most=most)
    overlap = _overlap(cache)
    pack_tail(pages, numbers, cache=cache, numerics=_numerics(storage), slots=taken, overlap=overlap)


@append_step.register_fake
def _(k, v, base, k_block_mean, high, tail, rings, block0_mean, sink_value, page_table, lengths, budget, overrun,
      k_channel_scale, v_head_scale, slot_of_page, block_of_slot, past_mass, slots, bounds, quota, storage,
      first_in_page, counts=None, starts=None, most=None):  # fmt: skip
    return None


def append(
    k: Tensor,
    v: Tensor,
    cache: CacheTensors,
    numerics: DecodeNumerics,
    *,
    counts: Tensor | None = None,
    starts: Tensor | None = None,
    most: int | None = None,
) -> None:
    """Append at most 64 tokens to every sequence of a cache and pack the blocks that are complete now.

    Two launches, whatever the batch. Nothing is written to a sequence without a page for the block it would complete, and
    `CacheTensors.overrun` is set.

    Args:
        k: new tokens ``[B, Hkv, T, D]`` in the dtype of the cache, T from 1 to 64.
        v: likewise.
        cache: all of it but ``page_table`` and ``budget`` may change; ``lengths`` grow by T.
        numerics: how blocks are stored.
        counts: int32 ``[B]`` on the device: each sequence takes its first ``counts[b]`` tokens, 0 to T; all T by default.
        starts: int32 ``[B + 1]`` on the device where tokens are packed, ``[tokens, Hkv, D]``: sequence b takes those from
            ``starts[b]`` to ``starts[b + 1]``, 0 to ``most``. Those of no sequence are not read.
        most: T, the most tokens of a sequence, where they are packed.

    Raises:
        ValueError: more tokens than one step may bring (`thrift_attn.decode.append.write_tail`).
    """
    append_step(k, v, *_flat(cache), _storage(numerics), cache.first_in_page, counts, starts, most)


def _flat(cache: CacheTensors) -> tuple[Tensor, ...]:
    """Return the tensors of a cache in the order of the operators; those that are not there are empty."""
    high = cache.base if cache.high is None else cache.high
    scales = (
        x if x is not None else cache.base.new_empty(0, dtype=torch.float32)
        for x in (cache.k_channel_scale, cache.v_head_scale)
    )  # fmt: skip
    residents = cache.residents
    if residents is None:
        pooled = tuple(cache.base.new_empty(0) for _ in range(6))
    else:
        pooled = (
            residents.slot_of_page, residents.block_of_slot, residents.past_mass, residents.slots, residents.bounds,
            residents.quota,
        )  # fmt: skip
    return (
        cache.base, cache.k_block_mean, high, cache.tail, cache.rings, cache.block0_mean, cache.sink_value,
        cache.page_table, cache.lengths, cache.budget, cache.overrun, *scales, *pooled,
    )  # fmt: skip


def _bundle(first_in_page: bool, *flat: Tensor, promotes_all: bool = False) -> CacheTensors:
    """Return the cache whose tensors `_flat` gave."""
    (
        base, k_block_mean, high, tail, rings, block0_mean, sink_value, page_table, lengths, budget, overrun,
        k_channel_scale, v_head_scale, slot_of_page, block_of_slot, past_mass, slots, bounds, quota,
    ) = flat  # fmt: skip
    residents = None
    if slot_of_page.numel():
        residents = ResidentTensors(
            slot_of_page=slot_of_page,
            block_of_slot=block_of_slot,
            past_mass=past_mass,
            slots=slots,
            bounds=bounds,
            quota=quota,
        )
    return CacheTensors(
        base=base,
        k_block_mean=k_block_mean,
        high=high,
        tail=tail,
        rings=rings,
        block0_mean=block0_mean,
        sink_value=sink_value,
        page_table=page_table,
        lengths=lengths,
        budget=budget,
        overrun=overrun,
        k_channel_scale=k_channel_scale if k_channel_scale.numel() else None,
        v_head_scale=v_head_scale if v_head_scale.numel() else None,
        residents=residents,
        first_in_page=first_in_page,
        promotes_all=promotes_all,
    )


@torch.library.custom_op("thrift_attn::attend_cache", mutates_args=("past_mass",), device_types=None)
def attend_cache(
    q: Tensor,
    base: Tensor,
    k_block_mean: Tensor,
    high: Tensor,
    tail: Tensor,
    rings: Tensor,
    block0_mean: Tensor,
    sink_value: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    budget: Tensor,
    overrun: Tensor,
    k_channel_scale: Tensor,
    v_head_scale: Tensor,
    slot_of_page: Tensor,
    block_of_slot: Tensor,
    past_mass: Tensor,
    slots: Tensor,
    bounds: Tensor,
    quota: Tensor,
    storage: str,
    first_in_page: bool,
    promotes_all: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    starts: Tensor | None = None,
    most: int = 1,
) -> tuple[Tensor, Tensor]:
    """`attend` with its bundles taken apart."""
    cache = _bundle(
        first_in_page, base, k_block_mean, high, tail, rings, block0_mean, sink_value, page_table, lengths, budget, overrun,
        k_channel_scale, v_head_scale, slot_of_page, block_of_slot, past_mass, slots, bounds, quota, promotes_all=promotes_all,
    )  # fmt: skip
    limits = {"window": window, "softcap": softcap}
    step = begin_step(q, cache, _numerics(storage), scale=scale, **limits, starts=starts, most=most)
    for launch in step_kernels(step).values():
        launch()
    return step.out, step.lse


@attend_cache.register_fake
def _(q, base, k_block_mean, high, tail, rings, block0_mean, sink_value, page_table, lengths, budget, overrun,
      k_channel_scale, v_head_scale, slot_of_page, block_of_slot, past_mass, slots, bounds, quota, storage,
      first_in_page, promotes_all, scale, window, softcap, starts=None, most=1):  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


def attend(
    q: Tensor,
    cache: CacheTensors,
    numerics: DecodeNumerics,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    starts: Tensor | None = None,
    most: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a cache; see `DecodeStep` for the arguments.

    Returns:
        The output ``[B, Hq, Tq, D]`` in the dtype of ``q``, and the LSE ``[B, Hq, Tq]``, float32, natural logarithm. Of packed
        queries, ``[tokens, Hq, D]`` with ``starts``, ``[tokens, Hq, D]`` and ``[tokens, Hq]``: 0 and -inf for those of no
        sequence.
    """
    flat = _flat(cache)
    forms = cache.first_in_page, cache.promotes_all
    return attend_cache(q, *flat, _storage(numerics), *forms, scale, window, softcap, starts, most)


def warm_up(
    cache: CacheTensors,
    numerics: DecodeNumerics,
    *,
    q_heads: int,
    new_tokens: tuple[int, ...] = (1,),
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Compile and load what `append` and `attend` run, so that no step stalls and a capture meets no new kernel.

    The cache keeps what it holds. Kernels of `attend` are compiled once per `padded_queries`: five times for 1 to 16 tokens.

    Args:
        cache: a cache as it will be used: its sizes decide what is compiled.
        numerics: what it stores and computes.
        q_heads: Hq.
        new_tokens: numbers of new tokens to be ready for.
        window: as for `attend`; there are kernels with and without one.
        softcap: as for `attend`; each value is a kernel of its own.
    """
    batch, kv_heads, dim = len(cache.lengths), cache.kv_heads, cache.tail.shape[-1]
    like = {"dtype": cache.tail.dtype, "device": cache.tail.device}
    if cache.residents is not None:  # nothing is added to what blocks have had
        cache = replace(cache, residents=replace(cache.residents, past_mass=cache.residents.past_mass.clone()))
    for tq in sorted({padded_queries(count) for count in new_tokens}):
        q = torch.zeros(batch, tq, q_heads, dim, **like).transpose(1, 2)
        for x in (q, q.contiguous()):  # strides as projections leave them, and as a rotary embedding does
            attend(x, cache, numerics, scale=1.0, window=window, softcap=softcap)
    k = torch.zeros(batch, 1, kv_heads, dim, **like).transpose(1, 2)
    nothing = torch.zeros_like(cache.lengths)
    for counts in (None, nothing):
        # Beside the cache: no page is complete, and the rings, the lengths and the flag are others.
        rings = torch.empty_strided((batch, *cache.tail.shape[1:]), cache.tail.stride(), **like)
        copied = {"tail": rings, "lengths": nothing.clone(), "overrun": cache.overrun.clone()}
        append(k, k, replace(cache, rings=torch.arange(batch).to(cache.rings), **copied), numerics, counts=counts)
