"""K and V of one sequence as the two paths see them: what the base decodes to, and what promoted blocks hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.reference import quantize as quant
from thrift_attn.reference.channel_scales import key_bias, measure_call
from thrift_attn.reference.formats import FORMATS, RESIDUALS


@dataclass(frozen=True)
class Planes:
    """K and V of one sequence as the two paths see them: compute dtype ``[Hkv, N * 64, D]``, zero-padded to whole blocks."""

    low_k: Tensor | None  # what the base encodes of K, or of K minus the block mean; None: the low path is dropped
    low_v: Tensor | None
    high_k: Tensor
    high_v: Tensor
    k_block_mean: Tensor  # c_b [Hkv, N, D], for scores and, with centring, for the low logits
    query_mean: Tensor | None = None  # [H, D], what Q is quantised less of
    key_bias: Tensor | None = None  # [H, N * 64], what that mean makes of each key, unscaled
    k_channel_scale: Tensor | None = None  # [Hkv, D], powers of two: K is quantised times it, Q divided by it
    block0_mean: Tensor | None = None  # [Hkv, D], mean of block 0 without token 0, which is then exact wherever it is
    exact_tail: bool = False  # a cache: the incomplete newest block is exact in both planes and outside of the budget
    resident: Tensor | None = None  # bool [Hkv, N], the blocks that can be promoted; None: all of them


def build_planes(k: Tensor, v: Tensor, numerics: PrefillNumerics, q: Tensor | None = None) -> Planes:
    """Quantise K and V ``[Hkv, T, D]`` of one sequence into the planes that ``numerics`` asks for.

    Args:
        k: keys.
        v: values.
        numerics: what is computed.
        q: the queries ``[H, Tq, D]`` that see something, for the statistics of a call
            (`thrift_attn.reference.channel_scales`); None takes nothing from queries.
    """
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    tokens, pad = k.shape[-2], (0, 0, 0, -k.shape[-2] % BLOCK)
    k_block_mean, block0_mean = quant.block_means(k).to(work), None
    if numerics.exact_sink:
        k_block_mean[:, 0], block0_mean = k[:, 0], quant.mean_of_others(k).to(work)
    k, v = (torch.nn.functional.pad(x.to(work), pad) for x in (k, v))
    if numerics.base_format == "drop":
        return Planes(None, None, k, v, k_block_mean)
    fmt, best = FORMATS[numerics.base_format], numerics.best_scales
    mean = torch.zeros((), dtype=work, device=k.device)
    if numerics.centred:
        mean = k_block_mean[:, :, None].expand(-1, -1, BLOCK, -1).flatten(1, 2).clone()
        mean[:, mean.shape[1] - pad[3] :] = 0  # padding stays zero
    delta, base_v = k - mean, v
    if numerics.exact_sink:  # dK is 0 as it is
        base_v = v.clone()
        base_v[:, 0] = 0
    taken = measure_call(None if q is None else q.to(work), k[:, :tokens], v[:, :tokens], numerics)
    bias = None
    if taken.query_mean is not None:
        bias = key_bias(taken.query_mean, k, k_block_mean if numerics.centred else torch.zeros_like(k_block_mean))
        bias[:, tokens:] = 0
    one = torch.ones((), dtype=work, device=k.device)
    k_scale = one if taken.k_channel_scale is None else taken.k_channel_scale[:, None]
    v_scale = one if taken.v_head_scale is None else taken.v_head_scale[:, None, None]
    low_k = quant.roundtrip(delta * k_scale, fmt, best=best)
    if fmt.group is None:
        low_v = quant.roundtrip_head(base_v)
    else:
        low_v = quant.roundtrip(base_v * v_scale, fmt, -2, best=best)
    high_k, high_v = k, v
    if numerics.residual is not None:
        plane = RESIDUALS[numerics.residual]
        high_k = mean + (low_k + quant.residual(delta * k_scale, low_k, plane, best=best)) / k_scale
        high_v = (low_v + quant.residual(base_v * v_scale, low_v, plane, -2, best=best)) / v_scale
        if numerics.exact_sink:
            high_v[:, 0] = v[:, 0]
    return Planes(
        low_k / k_scale,
        low_v / v_scale,
        high_k,
        high_v,
        k_block_mean,
        query_mean=taken.query_mean,
        key_bias=bias,
        k_channel_scale=taken.k_channel_scale,
        block0_mean=block0_mean,
    )
