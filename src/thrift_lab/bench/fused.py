"""Small operations of a decoder in one launch each, for whole-model timings, on both sides: rotary embedding, norm, gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_kernel(
    x_ptr,  # [B, H, T, D]
    cos_ptr,  # [1 or B, T, D], its two halves equal
    sin_ptr,
    stride_b,
    stride_h,
    stride_t,
    stride_cb,
    stride_ct,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # D / 2, a power of two
):
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + b * stride_cb + t * stride_ct + d).to(tl.float32)[None]
    sin = tl.load(sin_ptr + b * stride_cb + t * stride_ct + d).to(tl.float32)[None]
    heads = tl.arange(0, HEADS)[:, None]
    at = x_ptr + b * stride_b + heads * stride_h + t * stride_t + d[None]
    one, two = tl.load(at).to(tl.float32), tl.load(at + HALF).to(tl.float32)
    tl.store(at, (one * cos - two * sin).to(x_ptr.dtype.element_ty))
    tl.store(at + HALF, (two * cos + one * sin).to(x_ptr.dtype.element_ty))


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *unused: object, **also: object) -> tuple[Tensor, Tensor]:
    """What ``apply_rotary_pos_emb`` of transformers does, in place.

    Args:
        q: ``[B, Hq, T, D]``, contiguous in D, changed; Hq and D powers of two.
        k: ``[B, Hkv, T, D]``, likewise.
        cos: ``[1 or B, T, D]``.
        sin: likewise.
        *unused: what transformers also passes.
        **also: likewise.
    """
    batch, _, tokens, dim = q.shape
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    for x in (q, k):
        _rotate_kernel[(tokens, batch)](
            x, cos, sin, *x.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
            HEADS=x.shape[1], HALF=dim // 2, num_warps=4,
        )  # fmt: skip
    return q, k


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, epsilon, D: tl.constexpr, DP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    unit = tl.rsqrt(tl.sum(x * x, 0) / D + epsilon)
    tl.store(out_ptr + row * D + d, (x * unit * weight).to(out_ptr.dtype.element_ty), mask=d < D)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in float32, rounded once.

    Args:
        x: ``[..., D]``.
        weight: ``[D]``, contiguous.
        epsilon: added to the mean square.
    """
    x = x.contiguous()
    out, dim = torch.empty_like(x), x.shape[-1]
    width = triton.next_power_of_2(dim)
    _rms_norm_kernel[(x.numel() // dim,)](
        x, weight, out, epsilon, D=dim, DP=width, num_warps=max(1, min(16, width // 256))
    )
    return out


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=at < count)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element, in float32, rounded once; two contiguous tensors of one shape."""
    out, count = torch.empty_like(gate), gate.numel()
    _gate_kernel[(triton.cdiv(count, 1024),)](gate, up, out, count, BLOCK=1024, num_warps=4)
    return out
