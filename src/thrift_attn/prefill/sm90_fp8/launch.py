"""Launches the FP8 prefill kernel of sm_90, see `thrift_attn.prefill.sm90_fp8.kernel`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from thrift_attn.config import BLOCK
from thrift_attn.dispatch import why_not_sm90_fp8
from thrift_attn.kernels.launcher import launch
from thrift_attn.prefill.bundles import BlockLists, LogitRules, PrefillOutput, PrefillTensors
from thrift_attn.prefill.pack import PackedKV, PackedQ
from thrift_attn.prefill.sm90_fp8.kernel import attend_fp8_kernel
from thrift_attn.prefill.sm90_fp8.loader import CHUNK

TILE = 128
"""Query rows and tokens of a tile: two blocks."""

L2_BYTES = 24 << 20
"""K and V of the heads that run side by side should fit in this much of the L2 cache."""


def _describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of tiles ``[rows, columns]`` of the last two dimensions."""
    layout = gl.NVMMASharedLayout(min(128, columns * x.element_size()), 8 * x.element_size(), x.ndim)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1] * (x.ndim - 2) + [rows, columns], layout)


def _sections(heads: int, head_bytes: int) -> int:
    """KV heads that run side by side: the most that divide their number and fit the cache."""
    room = max(1, L2_BYTES // head_bytes)
    return max(n for n in range(1, min(heads, room) + 1) if heads % n == 0)


def _expected_shapes(tensors: PrefillTensors, causal: bool, capacity: int) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that goes with ``tensors``, by name."""
    q, k, _ = tensors
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    offset = keys - queries if causal else 0
    q_blocks, blocks = -(-(offset % BLOCK + queries) // BLOCK), -(-keys // BLOCK)
    return {
        "q": (batch, heads, q_blocks * BLOCK, dim),
        "q_scale": (batch, heads, q_blocks),
        "k": (batch, kv_heads, blocks * BLOCK, dim),
        "k_scale": (batch, kv_heads, blocks),
        "v": (batch, kv_heads, dim, blocks * BLOCK),
        "v_scale": (batch, kv_heads, blocks),
        "k_block_mean": (batch, kv_heads, blocks, dim),
        "block_indices": (batch, heads, q_blocks, capacity),
        "block_counts": (batch, heads, q_blocks),
        "sink_logits": (batch, heads, q_blocks * BLOCK),
        "out": tuple(q.shape),
        "lse": tuple(q.shape[:3]),
    }


def attend_fp8(
    tensors: PrefillTensors,
    *,
    packed_q: PackedQ,
    packed_kv: PackedKV,
    lists: BlockLists | None,
    rules: LogitRules,
    into: PrefillOutput,
    causal: bool = True,
    centred: bool = True,
) -> None:
    """Attention over FP8 data with promoted blocks in 16 bits, on sm_90; nothing is copied to the host.

    Data are those of a batch of sequences of one length in the native form of fp8, see `thrift_attn.prefill.pack`: e4m3 codes
    and float32 scales; scales of V are the same for all blocks of a head.

    Args:
        tensors: of the call, D 64 or 128, rows contiguous and aligned to 16 bytes; with ``causal`` Tq <= Tk.
        packed_q: with logits of the first token that one is exact: packed K and V hold the block mean and 0 for it. Without,
            it is as all others.
        packed_kv: K less the block means if ``centred``.
        lists: the promoted blocks; None: nothing is promoted.
        rules: scale (positive), window and softcap.
        into: where output and LSE are written.
        causal: whether a query sees only keys up to its own position.
        centred: whether q . c_b is added.

    Raises:
        NotImplementedError: a call the kernel cannot serve, see `thrift_attn.dispatch.why_not_sm90_fp8`.
        ValueError: packed data that are missing or whose shapes do not fit.
    """
    q, k, v = tensors
    problem = why_not_sm90_fp8(q, k, v, causal=causal, scale=rules.scale)
    if problem:
        raise NotImplementedError(problem)
    q8, k8, v8, sink_logits = packed_q.q, packed_kv.k, packed_kv.v, packed_q.sink_logits
    if q8 is None or k8 is None or v8 is None:
        raise ValueError("q, k and v must have been quantised")
    capacity = 0 if lists is None else lists.block_indices.shape[-1]
    given: dict[str, Tensor | None] = {
        **{"q": q8, "q_scale": packed_q.q_scale, "k": k8, "k_scale": packed_kv.k_scale, "v": v8},
        **{"v_scale": packed_kv.v_scale, "out": into.out, "lse": into.lse},
    }
    if centred:
        given["k_block_mean"] = packed_kv.k_block_mean
    if lists is not None:
        given |= lists._asdict()
    if sink_logits is not None:
        given["sink_logits"] = sink_logits
    shapes = _expected_shapes(tensors, causal, capacity)
    for name, x in given.items():
        if x is None or tuple(x.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {list(shapes[name])}, got {None if x is None else list(x.shape)}")
        if name != "out" and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    (batch, q_heads, queries, dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    offset = keys - queries if causal else 0
    q_blocks, blocks = shapes["q_scale"][2], shapes["k_scale"][2]
    q_tiles = (offset + queries - 1) // TILE - offset // TILE + 1
    promote = lists is not None and capacity > 0
    spare = torch.empty(1, dtype=torch.int32, device=q.device) if lists is None else lists.block_counts
    mean = packed_kv.k_block_mean if centred else k[:, :, :1]
    launch(
        attend_fp8_kernel,
        (q_tiles * batch * q_heads,),
        *(_describe(q, TILE, dim), _describe(k, BLOCK, dim), _describe(v, BLOCK, dim)),
        *(_describe(x.flatten(0, 1), *tile) for x, tile in ((q8, (TILE, dim)), (k8, (TILE, dim)), (v8, (dim, TILE)))),
        *(_describe(mean.flatten(0, 1), CHUNK.value, dim), _describe(into.out, BLOCK, dim)),
        *(into.out, packed_q.q_scale, packed_kv.k_scale, packed_kv.v_scale),
        *(into.lse if sink_logits is None else sink_logits, v),
        *(lists.block_indices if lists is not None and promote else spare, spare, into.lse),
        *(*into.out.stride()[:3], *v.stride()[:2]),
        *(float(rules.scale), float(rules.softcap or 0) * math.log2(math.e), int(rules.window or 0)),
        *(queries, keys, offset, q_blocks, blocks, capacity, q_tiles, kv_heads),
        _sections(batch * kv_heads, 2 * dim * BLOCK * blocks),
        GROUP=q_heads // kv_heads,
        D=dim,
        CAUSAL=causal,
        WINDOW=rules.window is not None,
        CAP=rules.softcap is not None,
        PROMOTE=promote,
        CENTRED=centred,
        SINK=sink_logits is not None,
    )
