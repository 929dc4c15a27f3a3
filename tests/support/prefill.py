"""Inputs of the prefill kernels, what they should give, and the check against it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from support.device import DEVICE
from thrift_attn.config import ThriftConfig
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.prefill.bundles import KernelNumerics, PrefillTensors
from thrift_attn.prefill.ops import prefill
from thrift_attn.prefill.pack import quantise_kv
from thrift_attn.prefill.statistics import measure
from thrift_attn.reference import attention as reference
from thrift_attn.reference.attention import Mask
from thrift_attn.reference.formats import FORMATS
from thrift_attn.seq_layout import SeqLayout, dense

DTYPE = torch.float16
EPS = 2.0**-11
"""Largest relative rounding error of DTYPE."""


def draw(batch: int, heads: tuple[int, int], queries: int, keys: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K with a bias per head and a topic per block, V."""
    q = 1.5 * torch.randn(batch, heads[0], queries, dim)
    k = torch.randn(batch, heads[1], keys, dim) + 2 * torch.randn(heads[1], 1, dim)
    k += torch.randn(batch, heads[1], -(-keys // 64), dim).repeat_interleave(64, 2)[:, :, :keys]
    v = torch.randn(batch, heads[1], keys, dim)
    return q.to(DEVICE, DTYPE), k.to(DEVICE, DTYPE), v.to(DEVICE, DTYPE)


def written(k: Tensor, v: Tensor, layout: SeqLayout, config: ThriftConfig) -> dict[str, Tensor]:
    """Planes of 4-bit formats [B, ...] as the kernels write them, decoded, on the CPU.

    test_pack_prefill.py and test_statistics.py check them. Where two scales are equally good, or a power of two lies
    halfway, the order of a sum decides, which differs on a GPU.
    """
    numerics = PrefillNumerics.resolve(config)
    options = replace(KernelNumerics.of(numerics, "decoded"), subtract_query_mean=False)
    statistics = measure(PrefillTensors(k, k, v), layout=layout, numerics=options)
    packed = quantise_kv(k, v, layout=layout, numerics=options, statistics=statistics)
    rest = numerics.residual
    found = {
        "low_k": packed.k,
        "low_v": packed.v,
        "k_block_mean": packed.k_block_mean,
        "k_channel_scale": statistics[1],
    }
    if rest is not None:
        mean = packed.k_block_mean.float().repeat_interleave(64, 2) if numerics.centred else 0
        found |= {"high_k": mean + packed.k.float() + packed.k_residual.float()}
        found |= {"high_v": packed.v.float() + packed.v_residual.float()}
        if numerics.exact_sink:
            found["high_v"][:, :, 0] = v[:, :, 0]
    return {name: x.float().cpu() for name, x in found.items() if x is not None}


def expected(
    q, k, v, config: ThriftConfig, own: dict[str, Tensor], *, causal=True, window=None, softcap=None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Output, LSE [H, Tq], promoted blocks [H, R, N] and mass of one sequence by the reference's parts, the kernel's peak.

    Where P is rounded, the reference takes exp(S - max) and the kernel exp2(S' - ceil(max)), S' = S log2(e).
    """
    mask = Mask(q.shape[1], k.shape[1], causal, window)
    numerics = PrefillNumerics.resolve(config)
    planes = replace(reference.build_planes(k, v, numerics, q[:, mask.hidden :]), **own)
    one = reference._Sequence(q, planes, numerics, mask, q.shape[-1] ** -0.5, softcap)
    promoted, _ = one.select()
    chunk = reference._Chunk(slice(0, promoted.shape[1]), 0, one.q.shape[1], 0, promoted.shape[2])
    exact = one._logits(planes.high_k, chunk)
    high = promoted[:, one.row_of].repeat_interleave(64, -1)
    low = exact if planes.low_k is None else one._low_logits(planes.low_k, chunk)
    if planes.low_k is None:
        low = low.masked_fill(~high, -torch.inf)
    logits = one._masked(torch.where(high, exact, low), chunk).double()
    peak = (logits.amax(-1, keepdim=True) / math.log(2)).ceil() * math.log(2)
    p = (logits - torch.where(peak == -torch.inf, 0, peak)).exp()
    total = p.sum(-1, keepdim=True)
    group = len(q) // len(k)
    sink = torch.zeros_like(p)
    if planes.block0_mean is not None:
        sink[..., 0] = p[..., 0].masked_fill(high[..., 0], 0)
    high_p, p = torch.where(high, p, 0) + sink, torch.where(high, 0, p) - sink
    rounded = p.float()
    if planes.low_v is not None and config.compute == "fp4":
        rounded = reference._round_probabilities(p.float(), FORMATS[config.base_format])
    low_v = planes.high_v if planes.low_v is None else planes.low_v
    out = rounded.double() @ low_v.double().repeat_interleave(group, 0)
    out += high_p @ planes.high_v.double().repeat_interleave(group, 0)
    norm = torch.where(total == 0, 1, total)
    if numerics.normalize_rounded:
        norm = norm + (rounded.double() - p).sum(-1, keepdim=True)
    pad = (0, 0, mask.hidden, 0)
    out = torch.nn.functional.pad(out / norm, pad)
    lse = torch.nn.functional.pad((peak + total.log())[..., 0], (mask.hidden, 0), value=-torch.inf)
    mass = float((high_p.sum(-1, keepdim=True) / torch.where(total == 0, 1, total)).sum())
    return out, lse, promoted, mass


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def budget_of(config: ThriftConfig) -> float:
    """Relative error that rounding explains.

    Output, P and products of 16-bit data: a few EPS. Where P is rounded to 1 mantissa bit, an exponential that is off by
    1e-6 takes another code near a boundary: about 1e-5 of them, each off by a quarter, and each scale moves a group.
    """
    return 2 * EPS + (5e-3 if config.compute == "fp4" and config.base_format != "drop" else 0)


def check(q, k, v, config: ThriftConfig, form="decoded", *, causal=True, window=None, softcap=None) -> None:
    """A batch through the operator, against every sequence by itself."""
    layout = dense(len(q), q.shape[2], k.shape[2], causal, q.device)
    out, lse, counts, share = prefill(
        q, k, v, layout, config, form, scale=q.shape[-1] ** -0.5, window=window, softcap=softcap, high_fraction=True
    )
    assert out.dtype == q.dtype
    assert not out.isnan().any()
    planes = written(k, v, layout, config) if config.base_format in ("nvfp4", "mxfp4") else {}
    out, lse, counts, share = (x.cpu() for x in (out, lse, counts, share))
    # On a GPU PyTorch divides another way, and codes at the middle of a step differ.
    q, k, v = (x.cpu() for x in (q, k, v))
    mass = 0.0
    for b in range(len(q)):
        own = {name: x[b] for name, x in planes.items()}
        want, want_lse, promoted, part = expected(
            q[b], k[b], v[b], config, own, causal=causal, window=window, softcap=softcap
        )
        mass += part
        assert error(out[b], want) < budget_of(config)
        torch.testing.assert_close(lse[b].double(), want_lse, rtol=1e-5, atol=1e-4)
        rows = counts[b, :, counts.shape[2] - promoted.shape[1] :]
        assert torch.equal(rows.long(), promoted.sum(-1))
    assert float(share.sum()) == pytest.approx(mass, rel=1e-4, abs=1e-4)
