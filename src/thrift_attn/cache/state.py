"""What a paged cache holds, as plain tensors, and back: for files and for moving between pools."""

from __future__ import annotations

import torch
from torch import Tensor

from thrift_attn.cache.cache_scales import CacheLevels
from thrift_attn.cache.paged import PagedThriftCache
from thrift_attn.config import BLOCK


def dump(cache: PagedThriftCache) -> dict[str, Tensor]:
    """Everything that is needed to restore the sequences of a cache; a page that sequences share is there once.

    Returns:
        ``base``, ``centres``, ``high``: the planes ``[n, Hkv, ...]`` of the pages in use; ``blocks``: int64 ``[B, most]``,
        which of them holds each complete block of each sequence, -1 behind the last; ``tokens``: int64 ``[B]``;
        ``tail``: the 16-bit slots; ``sinks``: ``[2, B, Hkv, D]``, what pages do not hold of first blocks; ``slots``: int64
        ``[B, 2]``, the block that each slot holds; ``levels_k`` ``[Hkv, D]`` and ``levels_v`` ``[Hkv]``: the powers of two
        that all K and V are multiplied by, of a cache with ``balance``.
    """
    tokens = [cache.tokens(row) for row in range(cache.batch)]
    pages, numbers = torch.cat([cache.table.pages(row) for row in range(cache.batch)]).unique(return_inverse=True)
    blocks = torch.full((cache.batch, max(tokens) // BLOCK), -1, dtype=torch.int64)
    for row, found in enumerate(numbers.cpu().split([count // BLOCK for count in tokens])):
        blocks[row, : len(found)] = found
    planes = {name: plane[pages] for name, plane in zip(cache.pool._fields, cache.pool, strict=True)}
    slots = torch.tensor(cache._slots)
    found = {**planes, "blocks": blocks, "tokens": torch.tensor(tokens), "tail": cache.tail}
    found["sinks"] = torch.stack([cache.block0_mean, cache.sink_value])
    found["slots"] = slots
    if cache.levels is not None:
        found |= {"levels_k": cache.levels.keys[:, 0], "levels_v": cache.levels.values[:, 0, 0]}
    return found


def restore(cache: PagedThriftCache, saved: dict[str, Tensor]) -> None:
    """Fill an empty cache with what `dump` gave.

    Raises:
        ValueError: a cache that is not empty, or of another batch, shape or plane of high precision.
        RuntimeError: the pool is too small.
    """
    tokens = saved["tokens"].tolist()
    if len(tokens) != cache.batch:
        raise ValueError(f"the saved batch has {len(tokens)} sequences, the cache {cache.batch}")
    if any(cache.tokens(row) for row in range(cache.batch)):
        raise ValueError("a cache must be empty to be restored; free its sequences first")
    for name, plane in zip(cache.pool._fields, cache.pool, strict=True):
        if saved[name].shape[1:] != plane.shape[1:] or saved[name].dtype != plane.dtype:
            got = f"{list(saved[name].shape[1:])} {saved[name].dtype}"
            raise ValueError(f"pages of {name} have shape {list(plane.shape[1:])} {plane.dtype}, the saved ones {got}")
    if saved["tail"].shape != cache.tail.shape:
        raise ValueError(f"the 16-bit slots have shape {list(cache.tail.shape)}, got {list(saved['tail'].shape)}")
    for row in range(cache.batch):
        cache.free(row)  # pages reserved but not written
    held = [[number for number in row if number >= 0] for row in saved["blocks"].tolist()]
    given = torch.tensor(cache.table.assign(held, tokens), dtype=torch.int64, device=cache.device)
    for name, plane in zip(cache.pool._fields, cache.pool, strict=True):
        plane[given] = saved[name].to(cache.device)
    cache.tail.copy_(saved["tail"])
    cache.block0_mean.copy_(saved["sinks"][0])
    cache.sink_value.copy_(saved["sinks"][1])
    if "levels_k" in saved:
        cache.levels = CacheLevels.ones(cache.kv_heads, cache.head_dim, cache.dtype, cache.device)
        cache.levels.set(saved["levels_k"].to(cache.device).float(), saved["levels_v"].to(cache.device).float())
    else:
        cache.levels = None
    cache._slots = saved["slots"].tolist()
