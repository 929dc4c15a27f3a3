"""The public call: check the input, pick a backend, attend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from thrift_attn.attend import reference
from thrift_attn.attend.stats import Stats
from thrift_attn.capability import pick_backend
from thrift_attn.config import ThriftConfig, check_logits
from thrift_attn.quant.formats import FORMATS

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
    group = FORMATS[config.low].group if config.low != "drop" else None
    if group is not None and q.shape[3] % group:
        raise ValueError(f"low={config.low!r} needs a head dim that is a multiple of {group}, got {q.shape[3]}")
    if config.high in ("nested", "nested8") and q.shape[3] % 16:
        raise ValueError(f"high={config.high!r} needs a head dim that is a multiple of 16, got {q.shape[3]}")
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
    if bool((kv_lengths < 1).any()) or bool((kv_lengths > k.shape[2]).any()):
        raise ValueError(f"kv_lengths must be in [1, {k.shape[2]}], got {kv_lengths.tolist()}")


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
        backend: ``"auto"``, ``"reference"`` or ``"triton"``; see `thrift_attn.support`.
        return_lse: also return the log-sum-exp of the logits, natural logarithm ``[B, Hq, Tq]``, float32 (float64 for
            float64 input).
        return_stats: also return `Stats`: pairs promoted, asked and visible, and softmax mass per path.

    Returns:
        The output ``[B, Hq, Tq, D]`` in the dtype of ``q``, followed by the LSE and the statistics if asked for.

    Raises:
        ValueError: shapes that do not fit, options out of range.
        TypeError: wrong or mixed dtypes.
        NotImplementedError: gradients, or a backend that cannot serve the call.

    Source: ThriftAttention, arXiv 2605.23081.
    """
    _check_tensors(q, k, v, config)
    check_logits(scale, window, softcap)
    if window is not None and not causal:
        raise ValueError("window needs causal=True: it counts back from the position of the query")
    _check_lengths(kv_lengths, k)
    pick_backend(backend)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    with torch.no_grad():
        out, lse, stats = reference.attend(
            q, k, v, config, causal=causal, scale=scale, window=window, softcap=softcap, kv_lengths=kv_lengths
        )
    if return_stats:
        return (out, lse, stats) if return_lse else (out, stats)
    return (out, lse) if return_lse else out
