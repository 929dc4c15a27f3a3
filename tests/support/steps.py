"""Steps of decode over given tensors, every buffer poisoned before the kernels write it."""

from __future__ import annotations

import dataclasses

import torch

from thrift_attn.config import ThriftConfig
from thrift_attn.decode.tensors import CacheTensors, DecodeStep, ResidentTensors, padded_rows
from thrift_attn.numerics import DecodeNumerics


def numerics_of(plane="nested", **options) -> DecodeNumerics:
    """What a cache computes with ``options`` of `ThriftConfig`; a ``plane`` of None promotes nothing."""
    config = ThriftConfig.for_cache(**({} if plane is None else {"promoted_storage": plane}), **options)
    return dataclasses.replace(DecodeNumerics.resolve(config), promoted_storage=plane)


def cache_tensors(k_block_mean, page_table, lengths, *, budget=None, block0_mean=None, **others) -> CacheTensors:
    """Tensors of a cache of which a test only gives some; the others are there and hold nothing."""
    batch, (_, kv_heads, dim), device = len(lengths), k_block_mean.shape, k_block_mean.device
    empty = torch.zeros(batch, kv_heads, dim, dtype=k_block_mean.dtype, device=device)
    given = {
        "base": torch.zeros(1, kv_heads, 1, dtype=torch.int32, device=device),
        "high": None,
        "tail": torch.zeros(batch, 2, kv_heads, 128, dim, dtype=k_block_mean.dtype, device=device),
        "rings": torch.arange(batch, dtype=torch.int32, device=device),
        "block0_mean": empty if block0_mean is None else block0_mean,
        "sink_value": empty.clone(),
        "budget": torch.zeros(page_table.shape[1] + 1, dtype=torch.int32, device=device) if budget is None else budget,
        "overrun": torch.zeros(1, dtype=torch.int32, device=device),
    }
    return CacheTensors(k_block_mean=k_block_mean, page_table=page_table, lengths=lengths, **{**given, **others})


def poisoned_step(
    q, cache: CacheTensors, numerics: DecodeNumerics, *, splits=1, scale=1.0, window=None, softcap=None,
    starts=None, most=1, one_each=False,
) -> DecodeStep:  # fmt: skip
    batch, heads, dim, tq = len(cache.lengths), q.shape[1], q.shape[-1], q.shape[2] if starts is None else most
    kv_heads, capacity = cache.kv_heads, cache.max_blocks
    splits = capacity if one_each else splits
    rows, pooled = padded_rows(heads // kv_heads, tq), cache.residents is not None

    def poison(*shape, dtype=torch.float32):
        fill = torch.nan if dtype.is_floating_point else -5
        return torch.full(shape, fill, dtype=dtype, device=q.device)

    scores = poison(batch, kv_heads, capacity)
    return DecodeStep(
        q=q,
        tq=tq,
        starts=starts,
        cache=cache,
        numerics=numerics,
        scale=scale,
        window=window,
        softcap=softcap,
        overlap=False,
        one_each=one_each,
        bias=poison(batch, kv_heads, capacity, rows),
        scores=scores,
        first_scores=scores if tq == 1 else poison(batch, kv_heads, capacity),
        score_lse=poison(batch, kv_heads, -(-capacity // 64)),
        block_indices=poison(batch, kv_heads, 3 if pooled else 2, capacity, dtype=torch.int32),
        block_counts=poison(batch, kv_heads, 2, dtype=torch.int32),
        partial_out=poison(batch, kv_heads, splits, rows, dim),
        partial_lse=poison(batch, kv_heads, splits, rows),
        out=poison(*q.shape, dtype=q.dtype),
        lse=poison(batch, heads, tq) if starts is None else poison(len(q), heads),
    )


def residents_of(slot_of_page, batch, capacity, *, slots=None, bounds=None, quota=None) -> ResidentTensors:
    """Residents of which a test only gives some: by default slots hold nothing, and no sequence shares or owns any."""
    pages, kv_heads = slot_of_page.shape
    device, count = slot_of_page.device, max(1, int(slot_of_page.max()) + 1)

    def none(*shape):
        return torch.full(shape, -1, dtype=torch.int32, device=device)

    return ResidentTensors(
        slot_of_page=slot_of_page,
        block_of_slot=none(count, kv_heads),
        past_mass=torch.zeros(pages, kv_heads, device=device),
        slots=none(batch, count) if slots is None else slots,
        bounds=torch.zeros(batch, 3, dtype=torch.int32, device=device) if bounds is None else bounds,
        quota=torch.zeros(capacity + 1, dtype=torch.int32, device=device) if quota is None else quota,
    )


def choose(scores, page_table, lengths, budget, *, tq=1, first=0, last=1, window=None) -> DecodeStep:
    """A step whose blocks `thrift_attn.decode.select` has chosen by given scores ``[B, Hkv, NB]``."""
    from thrift_attn.decode.select import select_blocks

    batch, kv_heads, _ = scores.shape
    means = torch.zeros(1, kv_heads, 16, dtype=torch.float16, device=scores.device)
    q = torch.zeros(batch, kv_heads, tq, 16, dtype=torch.float16, device=scores.device)
    cache = cache_tensors(means, page_table, lengths, budget=budget)
    step = poisoned_step(q, cache, numerics_of(force_first=first, force_last=last), window=window)
    step.scores.copy_(scores)
    select_blocks(step)
    return step
