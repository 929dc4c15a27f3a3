"""The powers of two that a sequence of a cache takes from its first block, when that is packed."""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.kernels.powers_of_two import k_channel_scale, log_root, v_head_scale, within_reach


@triton.jit
def scales_of_block(
    k_start, v_start, stride_kt, stride_vt, CENTRED: tl.constexpr, SINK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Powers of two [DP] of K and one of V, from a block without its first token, which bounds them only: the twin of
    `thrift_attn.reference.channel_scales.scales_of_block`.
    """
    d = tl.arange(0, DP)
    eight = tl.arange(0, 8)[:, None]
    inside = (d < D)[None, :]
    own = tl.load(k_start + d, mask=d < D, other=0.0)
    mean = tl.zeros([DP], tl.float32)  # of the others
    centre = tl.zeros([DP], tl.float32)  # c_b
    if CENTRED:
        for start in range(0, 64, 8):
            token = start + eight
            k = tl.load(k_start + token * stride_kt + d[None, :], mask=inside & (token > 0), other=0.0)
            mean += tl.sum(k.to(tl.float32), 0)
        centre = own.to(tl.float32)
        if not SINK:
            centre = ((mean + centre) * 0.015625).to(own.dtype).to(tl.float32)
        mean = mean / 63.0
    channels = tl.zeros([DP], tl.float32)
    keys = tl.zeros([DP], tl.float32)
    values = tl.zeros([DP], tl.float32)
    largest_k = tl.zeros([DP], tl.float32)
    largest_v = tl.zeros([DP], tl.float32)
    for start in range(0, 64, 8):
        token = start + eight
        there = inside & (token > 0)
        k = tl.load(k_start + token * stride_kt + d[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_start + token * stride_vt + d[None, :], mask=there if SINK else inside, other=0.0).to(tl.float32)
        largest_k = tl.maximum(largest_k, tl.max(tl.abs(k - centre[None, :]), 0))
        largest_v = tl.maximum(largest_v, tl.max(tl.abs(v), 0))
        v = tl.where(there, v, 0.0)
        keys += tl.sum(tl.where(there, k * k, 0.0), 0)
        values += tl.sum(v * v, 0)
        k = tl.where(there, k - mean[None, :], 0.0)
        channels += tl.sum(k * k, 0)
    k_size = log_root(tl.sum(keys, 0) / (63.0 * D))
    k_scale = k_channel_scale(log_root(channels / 63.0), k_size, d < D, D)
    v_scale = v_head_scale(tl.sum(values, 0) / (63.0 * D))
    return within_reach(k_scale, largest_k), within_reach(v_scale, tl.max(largest_v, 0))
