"""Launches the FP8 prefill kernel of sm_90, see `thrift_attn.prefill.sm90_fp8.kernel`."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from thrift_attn.config import BLOCK
from thrift_attn.kernels.launcher import launch
from thrift_attn.prefill.sm90_fp8.kernel import attend_fp8_kernel
from thrift_attn.prefill.sm90_fp8.loader import CHUNK

TILE = 128
"""Query rows and tokens of a tile: two blocks."""

HEAD_DIMS = (64, 128)
"""Head dims the kernel serves."""

L2_BYTES = 24 << 20
"""K and V of the heads that run side by side should fit in this much of the L2 cache."""

_TMA_ALIGNMENT = 16

KNOWN_GLUON = hasattr(gl.shared_memory_descriptor, "_reinterpret")
"""Whether this Triton has the Gluon that the kernel is written in, that of 3.6; names and rules have changed since."""


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of tiles ``[rows, columns]`` of the last two dimensions."""
    layout = gl.NVMMASharedLayout(min(128, columns * x.element_size()), 8 * x.element_size(), x.ndim)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1] * (x.ndim - 2) + [rows, columns], layout)


def _sections(heads: int, head_bytes: int) -> int:
    """KV heads that run side by side: the most that divide their number and fit the cache."""
    room = max(1, L2_BYTES // head_bytes)
    return max(n for n in range(1, min(heads, room) + 1) if heads % n == 0)


def why_not(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> str | None:
    """Why the kernel cannot serve this call, or None.

    Args:
        q: ``[B, Hq, Tq, D]``.
        k: ``[B, Hkv, Tk, D]``.
        v: the shape of ``k``.
        causal: whether queries are right-aligned and see only keys up to their own position.
        scale: factor of the logits.
    """
    if not KNOWN_GLUON:
        return f"the FP8 kernel of sm_90 is written in the Gluon of Triton 3.6, got Triton {triton.__version__}"
    if q.device.type != "cuda":
        return f"the FP8 kernel needs a CUDA device, got {q.device}"
    if torch.cuda.get_device_capability(q.device)[0] != 9:
        return f"the FP8 kernel needs compute capability 9.0, got {torch.cuda.get_device_capability(q.device)}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the FP8 kernel takes float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"the FP8 kernel serves head dims {HEAD_DIMS}, got {q.shape[-1]}"
    if causal and q.shape[2] > k.shape[2]:
        return f"the FP8 kernel needs Tq <= Tk when causal, got {q.shape[2]} and {k.shape[2]}"
    if not scale > 0:
        return f"the FP8 kernel needs a positive scale, got {scale}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        steps = list(zip(x.stride(), x.shape, strict=True))[:-1]
        aligned = all(n * x.element_size() % _TMA_ALIGNMENT == 0 and (n > 0 or size == 1) for n, size in steps)
        if x.stride(-1) != 1 or not aligned or x.data_ptr() % _TMA_ALIGNMENT:
            return f"the FP8 kernel needs {name} with contiguous rows on {_TMA_ALIGNMENT}-byte boundaries"
    return None


def attend_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q8: Tensor | None,
    q_scale: Tensor | None,
    k8: Tensor | None,
    k_scale: Tensor | None,
    v8: Tensor | None,
    v_scale: Tensor | None,
    centres: Tensor | None,
    chosen: Tensor | None,
    counts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> None:
    """Attention over FP8 data with promoted blocks in 16 bits, on sm_90; nothing is copied to the host.

    N is the number of KV blocks, R that of query blocks (64 absolute positions each, the first one holds query 0).

    Args:
        q: ``[B, Hq, Tq, D]``, float16 or bfloat16, D 64 or 128, rows contiguous and aligned to 16 bytes.
        k: ``[B, Hkv, Tk, D]``; with ``causal`` Tq <= Tk.
        v: the shape of ``k``.
        q8: e4m3 ``[B, Hq, R * 64, D]``, row 0 at position 64 * floor(offset / 64), offset = Tk - Tq if causal, else 0.
        q_scale: float32 ``[B, Hq, R]``: value = code * scale.
        k8: e4m3 ``[B, Hkv, N * 64, D]`` of K minus the centres.
        k_scale: float32 ``[B, Hkv, N]``.
        v8: e4m3 ``[B, Hkv, D, N * 64]``, tokens ordered as `thrift_attn.prefill.pack.position_of` says.
        v_scale: float32 ``[B, Hkv, N]``, the same for all blocks of a head.
        centres: ``[B, Hkv, N, D]`` in the dtype of ``q``, or None: K was not centred.
        chosen: int32 ``[B, Hq, R, C]``, promoted blocks of each query block, ascending; None: nothing is promoted.
        counts: int32 ``[B, Hq, R]``, how many of them are valid.
        out: ``[B, Hq, Tq, D]`` in the dtype of ``q``; written.
        lse: float32 ``[B, Hq, Tq]``, natural logarithm; written.
        scale: factor of the logits, positive.
        causal: whether a query sees only keys up to its own position.
        window: sliding window in tokens, or None.
        softcap: bound of the logits, or None.
        sink: float32 ``[B, Hq, R * 64]``, q . k of the first token in rows as of ``q8``: that token is exact, packed K and V
            hold the centre and 0 for it (`thrift_attn.prefill.pack`). None: it is as all others.

    Raises:
        NotImplementedError: a call the kernel cannot serve, see `why_not`.
        ValueError: packed data that are missing or whose shapes do not fit.
    """
    problem = why_not(q, k, v, causal=causal, scale=scale)
    if problem:
        raise NotImplementedError(problem)
    if q8 is None or k8 is None or v8 is None:
        raise ValueError("q, k and v must have been quantised")
    batch, q_heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    offset = keys - queries if causal else 0
    rows = -(-(offset % BLOCK + queries) // BLOCK)
    blocks = -(-keys // BLOCK)
    shapes = {
        "q8": (q8, (batch, q_heads, rows * BLOCK, dim)),
        "q_scale": (q_scale, (batch, q_heads, rows)),
        "k8": (k8, (batch, kv_heads, blocks * BLOCK, dim)),
        "k_scale": (k_scale, (batch, kv_heads, blocks)),
        "v8": (v8, (batch, kv_heads, dim, blocks * BLOCK)),
        "v_scale": (v_scale, (batch, kv_heads, blocks)),
        "out": (out, tuple(q.shape)),
        "lse": (lse, tuple(q.shape[:3])),
    }
    if centres is not None:
        shapes["centres"] = (centres, (batch, kv_heads, blocks, dim))
    if chosen is not None and counts is not None:
        shapes["chosen"] = (chosen, (batch, q_heads, rows, chosen.shape[-1]))
        shapes["counts"] = (counts, (batch, q_heads, rows))
    if sink is not None:
        shapes["sink"] = (sink, (batch, q_heads, rows * BLOCK))
    for name, (x, shape) in shapes.items():
        if x is None or tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {None if x is None else list(x.shape)}")
        if name != "out" and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    q_tiles = (offset + queries - 1) // TILE - offset // TILE + 1
    promote = chosen is not None and chosen.shape[-1] > 0
    spare = counts if counts is not None else torch.empty(1, dtype=torch.int32, device=q.device)
    launch(
        attend_fp8_kernel,
        (q_tiles * batch * q_heads,),
        _describe(q, TILE, dim), _describe(k, BLOCK, dim), _describe(v, BLOCK, dim),
        _describe(q8.flatten(0, 1), TILE, dim), _describe(k8.flatten(0, 1), TILE, dim),
        _describe(v8.flatten(0, 1), dim, TILE),
        _describe((k[:, :, :1] if centres is None else centres).flatten(0, 1), CHUNK.value, dim), _describe(out, BLOCK, dim),
        out, q_scale, k_scale, v_scale, lse if sink is None else sink, v, chosen if promote else spare, spare, lse,
        *out.stride()[:3], *v.stride()[:2],
        float(scale), float(softcap or 0) * math.log2(math.e), int(window or 0), queries, keys, offset, rows, blocks,
        0 if chosen is None else chosen.shape[-1], q_tiles, kv_heads,
        _sections(batch * kv_heads, 2 * dim * BLOCK * blocks),
        GROUP=q_heads // kv_heads, D=dim, CAUSAL=causal, WINDOW=window is not None, CAP=softcap is not None,
        PROMOTE=promote, CENTRED=centres is not None, SINK=sink is not None,
    )  # fmt: skip
