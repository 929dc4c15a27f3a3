"""Pages back to 16-bit K and V on the device: what a chunk of many new tokens attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.decode.gather_kernel import gather_pages_kernel
from thrift_attn.decode.tensors import CacheTensors
from thrift_attn.kernels.launcher import check_planes, launch, on_device_of
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.page_layout import HIGH


def gather_pages(
    k: Tensor, v: Tensor, *, cache: CacheTensors, numerics: DecodeNumerics, tokens: int, start: int = 0
) -> None:
    """Write K and V of every sequence up to its length, from its pages and from the tail, without channel scales.

    Blocks without a residual are what the base decodes to.

    Args:
        k: ``[B, Hkv, S, D]`` in the dtype of the cache, contiguous, written up to the length of each sequence; S is at least
            ``tokens``.
        v: likewise.
        cache: what is read.
        numerics: how blocks are stored.
        tokens: how many tokens from ``start`` on: up to the longest of the lengths, which the caller knows, or a multiple of
            64, for a tile.
        start: the first token, a multiple of 64.

    Raises:
        ValueError: too little room, tensors that are not contiguous, or a start within a block.
    """
    batch, kv_heads, capacity, dim = k.shape
    if capacity < tokens:
        raise ValueError(f"k and v must have room for {tokens} tokens, got {capacity}")
    if start % BLOCK:
        raise ValueError(f"a tile must start at a multiple of {BLOCK}, got {start}")
    if not (k.is_contiguous() and v.is_contiguous()):
        raise ValueError(f"k and v must be contiguous, got strides {k.stride()} and {v.stride()}")
    if not tokens:
        return
    plane, k_scale, v_scale = numerics.promoted_storage, cache.k_channel_scale, cache.v_head_scale
    residents = cache.residents
    high = cache.base if cache.high is None else cache.high
    cache.check_beside(batch, dim)
    check_planes(base=cache.base, k_block_mean=cache.k_block_mean, high=high)
    with on_device_of(k):
        launch(
            gather_pages_kernel,
            (-(-tokens // BLOCK), dim // 16, batch * kv_heads),
            k,
            v,
            cache.base.view(torch.int16),
            cache.base,
            cache.k_block_mean,
            high if plane == "16bit" else high.view(torch.int16),
            high,
            cache.tail,
            cache.rings,
            cache.sink_value,
            cache.page_table,
            cache.lengths,
            cache.k_block_mean if k_scale is None else k_scale,
            cache.k_block_mean if v_scale is None else v_scale,
            cache.page_table if residents is None else residents.slot_of_page,
            cache.max_blocks,
            capacity,
            start // BLOCK,
            **cache.strides("base", "high", "mean", "first"),
            FIRST_IN_PAGE=cache.first_in_page,
            **cache.ring_constants,
            HKV=kv_heads,
            D=dim,
            HIGH=HIGH[plane],
            CENTRED=numerics.centred,
            SINK=numerics.exact_sink,
            SCALED=k_scale is not None,
            FIXED=cache.scales_fixed,
            POOLED=residents is not None,
            num_warps=1,
        )
