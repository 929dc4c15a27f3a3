"""The tensors of a cache as an engine lays them out: records in pages of its own, rings of any size."""

from __future__ import annotations

import dataclasses

import torch

from support.device import DEVICE
from thrift_attn.decode.tensors import CacheTensors

GAP = 48
"""Bytes behind each record that are not ours."""


def in_records(cache: CacheTensors, *, first: bool = False) -> tuple[CacheTensors, torch.Tensor]:
    """The same cache where base, plane of promoted blocks and mean of a head lie beside each other, and what lies behind.

    With ``first`` what belongs to the first token of a sequence lies there, too.
    """
    planes = {"base": cache.base, "high": cache.high, "k_block_mean": cache.k_block_mean}
    if first:
        owners = cache.page_table[:, 0].long()
        for name in ("block0_mean", "sink_value"):
            planes[name] = torch.full_like(cache.k_block_mean, torch.nan)
            planes[name][owners[owners >= 0]] = getattr(cache, name)[owners >= 0]
    pages, heads, size = len(cache.base), cache.kv_heads, 0
    sizes = {name: x[0, 0].numel() * x.element_size() for name, x in planes.items()}
    buffer = torch.full((pages, heads, sum(sizes.values()) + GAP), 0x5A, dtype=torch.uint8, device=cache.base.device)
    views = {}
    for name, x in planes.items():
        views[name] = buffer[..., size : size + sizes[name]].view(x.dtype)
        views[name].copy_(x)
        size += sizes[name]
    return dataclasses.replace(cache, **views, first_in_page=first), buffer[..., size:]


def in_rings(cache: CacheTensors, size: int) -> CacheTensors:
    """A copy of a cache whose rings hold so many tokens, K and V of a token beside each other, and belong to others."""
    _, _, heads, before, dim = cache.tail.shape
    count = len(cache.lengths)
    places = torch.full((count + 2, heads, size, 2, dim), torch.nan, dtype=cache.tail.dtype, device=DEVICE)
    tail = places.permute(0, 3, 1, 2, 4)
    rings = torch.arange(count, 0, -1, dtype=torch.int32, device=DEVICE)
    for seq, (ring, length) in enumerate(zip(rings.tolist(), cache.lengths.tolist(), strict=True)):
        newest = torch.arange(max(0, length - min(size, before)), length, device=DEVICE)
        tail[ring][:, :, newest % size] = cache.tail[seq][:, :, newest % before]
    names = ("base", "high", "k_block_mean", "block0_mean", "sink_value", "lengths", "overrun")
    own = {name: getattr(cache, name).clone() for name in (*names, "k_channel_scale", "v_head_scale")}
    return dataclasses.replace(cache, tail=tail, rings=rings, **own)
