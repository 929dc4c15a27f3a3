"""The public call: check the input, pick a backend, attend."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from thrift_attn.config import ThriftConfig, check_logits
from thrift_attn.dispatch import pick_backend
from thrift_attn.reference import attention as reference
from thrift_attn.reference.formats import FORMATS
from thrift_attn.seq_layout import dense, packed, padded
from thrift_attn.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        config: ThriftConfig
        causal: bool
        scale: float | None
        window: int | None
        softcap: float | None
        kv_lengths: Tensor | None
        backend: str


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, config: ThriftConfig) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, H, T, D], got shape {list(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got shape {list(x.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head dim, got {list(q.shape)} and {list(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of KV heads, got {q.shape[1]} and {k.shape[1]}")
    group = FORMATS[config.base_format].group if config.base_format != "drop" else None
    if group is not None and q.shape[3] % group:
        raise ValueError(
            f"base_format={config.base_format!r} needs a head dim that is a multiple of {group}, got {q.shape[3]}"
        )
    if config.promoted_storage in ("nested", "nested8") and q.shape[3] % 16:
        raise ValueError(
            f"promoted_storage={config.promoted_storage!r} needs a head dim that is a multiple of 16, got {q.shape[3]}"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError(
            "attention is inference only: call it under torch.no_grad() or torch.inference_mode()"
        )


def _check_lengths(kv_lengths: Tensor | None, k: Tensor) -> None:
    if kv_lengths is None:
        return
    if not isinstance(kv_lengths, Tensor) or kv_lengths.dtype not in (torch.int32, torch.int64):
        got = kv_lengths.dtype if isinstance(kv_lengths, Tensor) else type(kv_lengths).__name__
        raise TypeError(f"kv_lengths must be an int32 or int64 tensor, got {got}")
    if kv_lengths.shape != k.shape[:1]:
        raise ValueError(f"kv_lengths must have shape [{k.shape[0]}], got {list(kv_lengths.shape)}")
    if kv_lengths.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # values cannot be looked at; the kernels clamp them
    if bool((kv_lengths < 1).any()) or bool((kv_lengths > k.shape[2]).any()):
        raise ValueError(f"kv_lengths must be in [1, {k.shape[2]}], got {kv_lengths.tolist()}")


def _ops() -> Any:
    """The operators; importing them needs Triton, which the reference does not."""
    return importlib.import_module("thrift_attn.prefill.ops")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_stats: Literal[False] = ...,
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Stats]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor, Stats]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: ThriftConfig = ThriftConfig(),  # noqa: B008 (frozen, so sharing the default is safe)
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    kv_lengths: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ...] | tuple[Tensor, Stats] | tuple[Tensor, Tensor, Stats]:
    """Attention with most query-key blocks in low precision and a budget of important ones in high precision.

    Queries are right-aligned: query i of a sequence with L keys sits at position L - Tq + i, so Tq < Tk is chunked
    prefill and Tq = 1 is decode. Up to 16 new tokens count as decode: all query heads of a KV head share one list of
    promoted blocks; longer calls choose per query head and block of 64 positions.

    Args:
        q: ``[B, Hq, Tq, D]``, float16, bfloat16, float32 or float64.
        k: ``[B, Hkv, Tk, D]``, the dtype and device of ``q``; Hkv divides Hq.
        v: the shape of ``k``.
        config: what is computed, see `ThriftConfig`.
        causal: whether a query sees only keys up to its own position.
        scale: factor of the logits; 1/sqrt(D) by default.
        window: sliding window in tokens: a query at position p sees keys > p - window. None for no window.
        softcap: logits become softcap * tanh(logits / softcap). None for no cap.
        kv_lengths: int ``[B]``: row b has keys ``k[b, :, :kv_lengths[b]]``; queries before its position 0 give 0 and
            LSE -inf. None when all rows have Tk keys.
        backend: ``"reference"``, plain PyTorch; ``"triton"``, the kernels; or ``"auto"``, the kernels on a CUDA device for what
            they serve, else the reference. See `thrift_attn.support`.
        return_lse: also return the log-sum-exp of the logits, natural logarithm ``[B, Hq, Tq]``, float32 (float64 for
            float64 input).
        return_stats: also return `Stats`: pairs promoted, asked and visible, and softmax mass per path. Copies them to the
            host.

    Returns:
        The output ``[B, Hq, Tq, D]`` in the dtype of ``q``, followed by the LSE and the statistics if asked for.

    Raises:
        ValueError: shapes that do not fit, options out of range.
        TypeError: wrong or mixed dtypes.
        NotImplementedError: gradients, or a backend that cannot serve the call.

    Source: ThriftAttention, arXiv 2605.23081.
    """
    _check_tensors(q, k, v, config)
    check_logits(scale, window, softcap, causal)
    _check_lengths(kv_lengths, k)
    served, form = pick_backend(backend, config, q.shape[3], q.dtype, q.device, k.shape[2])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    stats = Stats()
    with torch.no_grad():
        if served == "reference":
            out, lse, stats = reference.attend(
                q, k, v, config, causal=causal, scale=scale, window=window, softcap=softcap, kv_lengths=kv_lengths
            )
        else:
            ops = _ops()
            if kv_lengths is None:
                sequences = dense(q.shape[0], q.shape[2], k.shape[2], causal, q.device)
            else:
                sequences = padded(q.shape[2], k.shape[2], causal, kv_lengths.to(q.device))
            out, lse, counts, share = ops.prefill(
                q,
                k,
                v,
                sequences,
                config,
                form,
                scale=scale,
                window=window,
                softcap=softcap,
                high_fraction=return_stats,
            )
            if return_stats:
                stats = ops.prefill_stats(sequences, config, q.shape[1], counts, share, window)
    if return_stats:
        return (out, lse, stats) if return_lse else (out, stats)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    config: ThriftConfig = ThriftConfig(),  # noqa: B008 (frozen, so sharing the default is safe)
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences packed end to end; nothing is copied to the host on the kernels' path.

    Every query head and block of 64 positions has its own list of promoted blocks, also in sequences of up to 16 queries.

    Args:
        q: ``[queries, Hq, D]``, all sequences one after the other.
        k: ``[keys, Hkv, D]``.
        v: the shape of ``k``.
        cu_seqlens_q: int32 ``[B + 1]``: sequence b has the queries from entry b to entry b + 1.
        cu_seqlens_k: int32 ``[B + 1]`` for the keys; queries are right-aligned with the keys of their sequence.
        max_seqlen_q: at least the queries of the longest sequence.
        max_seqlen_k: at least the keys of the longest sequence.
        config: see `attention`.
        causal: see `attention`.
        scale: see `attention`.
        window: see `attention`.
        softcap: see `attention`.
        backend: see `attention`.
        return_lse: also return the log-sum-exp ``[Hq, queries]``.

    Returns:
        The output, the shape and dtype of ``q``, followed by the LSE if asked for.

    Raises:
        ValueError: shapes that do not fit, options out of range.
        TypeError: wrong or mixed dtypes.
        NotImplementedError: gradients, or a backend that cannot serve the call.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 3:
            raise ValueError(f"{name} must have 3 dimensions [tokens, H, D], got shape {list(x.shape)}")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    _check_tensors(q, k, v, config)
    check_logits(scale, window, softcap, causal)
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
        if x.ndim != 1 or len(x) < 2 or len(x) != len(cu_seqlens_q):
            raise ValueError(f"{name} must have shape [B + 1] with B >= 1, got {list(x.shape)}")
    for name, most, total in (("q", max_seqlen_q, q.shape[2]), ("k", max_seqlen_k, k.shape[2])):
        if not 1 <= most <= total:
            raise ValueError(f"max_seqlen_{name} must be in [1, {total}], got {most}")
    served, form = pick_backend(backend, config, q.shape[3], q.dtype, q.device, max_seqlen_k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    with torch.no_grad():
        if served == "triton":
            sequences = packed(
                cu_seqlens_q.to(q.device),
                cu_seqlens_k.to(q.device),
                queries=q.shape[2],
                keys=k.shape[2],
                max_queries=max_seqlen_q,
                max_keys=max_seqlen_k,
                causal=causal,
            )
            out, lse, *_ = _ops().prefill(q, k, v, sequences, config, form, scale=scale, window=window, softcap=softcap)
        else:
            out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
            starts = (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
            for q0, q1, k0, k1 in zip(starts[0], starts[0][1:], starts[1], starts[1][1:], strict=False):
                if q0 == q1 or k0 == k1:
                    out[0, :, q0:q1], lse[0, :, q0:q1] = 0, -torch.inf
                    continue
                mask = reference.Mask(q1 - q0, k1 - k0, causal, window, decode=False)
                hidden = max(0, q1 - q0 - (k1 - k0)) if causal else 0
                planes = reference.build_planes(k[0, :, k0:k1], v[0, :, k0:k1], config, q[0, :, q0 + hidden : q1])
                part, part_lse, _ = reference.attend_planes(q[0, :, q0:q1], planes, config, mask, scale, softcap)
                out[0, :, q0:q1], lse[0, :, q0:q1] = part, part_lse
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out
