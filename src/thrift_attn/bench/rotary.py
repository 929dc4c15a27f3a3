"""Rotary position embedding of Q and K in place, one launch: for whole-model timings, on both sides."""

from __future__ import annotations

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
