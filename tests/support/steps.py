"""Steps of decode over given tensors, every buffer poisoned before the kernels write it."""

from __future__ import annotations

import dataclasses

import torch

from thrift_attn.config import ThriftConfig
from thrift_attn.decode.tensors import CacheTensors, DecodeStep, padded_rows
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
        "tail": torch.zeros(2, batch, 2, kv_heads, 64, dim, dtype=k_block_mean.dtype, device=device),
        "block0_mean": empty if block0_mean is None else block0_mean,
        "sink_value": empty.clone(),
        "budget": torch.zeros(page_table.shape[1] + 1, dtype=torch.int32, device=device) if budget is None else budget,
        "overrun": torch.zeros(1, dtype=torch.int32, device=device),
    }
    return CacheTensors(k_block_mean=k_block_mean, page_table=page_table, lengths=lengths, **{**given, **others})


def poisoned_step(
    q, cache: CacheTensors, numerics: DecodeNumerics, *, splits=1, scale=1.0, window=None, softcap=None
) -> DecodeStep:
    batch, heads, tq, dim = q.shape
    kv_heads, capacity = cache.kv_heads, cache.max_blocks
    rows = padded_rows(heads // kv_heads, tq)

    def poison(*shape, dtype=torch.float32):
        fill = torch.nan if dtype.is_floating_point else -5
        return torch.full(shape, fill, dtype=dtype, device=q.device)

    return DecodeStep(
        q=q,
        cache=cache,
        numerics=numerics,
        scale=scale,
        window=window,
        softcap=softcap,
        overlap=False,
        bias=poison(batch, kv_heads, capacity, rows),
        scores=poison(batch, kv_heads, capacity),
        block_indices=poison(batch, kv_heads, 2, capacity, dtype=torch.int32),
        block_counts=poison(batch, kv_heads, 2, dtype=torch.int32),
        partial_out=poison(batch, kv_heads, splits, rows, dim),
        partial_lse=poison(batch, kv_heads, splits, rows),
        out=poison(*q.shape, dtype=q.dtype),
        lse=poison(batch, heads, tq),
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
