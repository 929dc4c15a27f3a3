"""Checks of what a user hands over, with errors that say what was expected and what came."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from thrift_attn.config import Layout, check_choice

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def whole_number(name: str, value: object) -> int:
    """Return a number as an int, so that books never hold a tensor that its owner changes.

    Raises:
        TypeError: something else than a whole number, or a bool.
    """
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None


def whole_numbers(name: str, values: object, *, each: str) -> list[int]:
    """Return a list, a tensor or any other sequence of numbers as ints; ``each`` is what errors call one of them.

    Raises:
        TypeError: no sequence, or something else than whole numbers in it.
    """
    try:
        found = list(values)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"{name} must be a sequence of whole numbers, got {values!r}") from None
    return [whole_number(each, value) for value in found]


def positive(name: str, value: object) -> int:
    """Return a whole number of at least 1 as an int.

    Raises:
        TypeError: something else than a whole number.
        ValueError: less than 1.
    """
    number = whole_number(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def check_flag(name: str, value: object) -> None:
    """Raise TypeError for anything else than True or False: any text would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_no_gradients(*tensors: Tensor) -> None:
    """Refuse tensors that gradients are asked of, in reverse or forward mode: nothing here has a backward pass.

    Raises:
        NotImplementedError: gradients.
    """
    reverse = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # Outside of a level of forward-mode differentiation no tensor has a tangent.
    forward = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if reverse or forward:
        raise NotImplementedError(
            "attention is inference only: it has no gradients. Call it under torch.no_grad() or torch.inference_mode(), "
            "or detach q, k and v"
        )


def check_strided(name: str, x: object) -> None:
    """Raise TypeError for anything else than a tensor whose numbers lie at strides: not nested, not sparse."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check dtypes, devices and shapes of q ``[B, Hq, Tq, D]`` and k and v ``[B, Hkv, Tk, D]``.

    Raises:
        TypeError: no tensors, or wrong or mixed dtypes.
        ValueError: shapes or devices that do not fit.
        NotImplementedError: gradients, or the device "meta".
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_strided(name, x)
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
    if q.is_meta:
        raise NotImplementedError("q, k and v must hold numbers, on a cpu or cuda device, got tensors on meta")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head dim, got {list(q.shape)} and {list(k.shape)}")
    if q.shape[1] % k.shape[1]:
        hint = f". {_BTHD}" if q.shape[1] < k.shape[1] and q.shape[2] % k.shape[2] == 0 else ""
        raise ValueError(f"query heads must be a multiple of KV heads, got {q.shape[1]} and {k.shape[1]}{hint}")
    check_no_gradients(q, k, v)


_BTHD = "Tensors of flash-attention's order [B, T, H, D] need layout='BTHD'"
_MOST_HEADS = 128
"""Models have no more query heads than this."""


def to_bhtd(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Views of tensors as ``[B, H, T, D]``, whichever layout they have; what is no 4-dimensional tensor is left to `check_qkv`.

    Raises:
        ValueError: an unknown layout.
    """
    check_choice("layout", layout, Layout)
    if layout == get_args(Layout)[0]:
        return tensors
    return tuple(x.transpose(1, 2) if _is_4d(x) else x for x in tensors)


def _is_4d(x: object) -> bool:
    return isinstance(x, Tensor) and not x.is_nested and x.ndim == 4


def warn_of_bthd(q: Tensor, k: Tensor, causal: bool) -> None:
    """Warn where q ``[B, Hq, Tq, D]`` and k ``[B, Hkv, Tk, D]`` make sense as ``[B, T, H, D]`` only.

    They do so with more heads than any model has, and more than tokens; and with more query heads than KV heads, which then
    look like queries before the first key.
    """
    if not all(_is_4d(x) and 0 not in x.shape for x in (q, k)):
        return  # check_qkv says so
    if q.shape[1] != k.shape[1] or q.shape[2] % k.shape[2]:
        return
    if (q.shape[1] > max(_MOST_HEADS, q.shape[2])) or (causal and q.shape[2] > k.shape[2]):
        warnings.warn(
            f"q {list(q.shape)} and k {list(k.shape)} are taken as [B, H, T, D]: {q.shape[1]} heads, {q.shape[2]} queries and "
            f"{k.shape[2]} keys. {_BTHD}",
            UserWarning,
            stacklevel=3,
        )


ELSEWHERE = {
    "is_causal": "causal=, which is True by default",
    "attn_mask": "causal=, window= or kv_lengths=, or thrift_attn.attention_varlen for packed sequences",
    "enable_gqa": "nothing in its place: k and v may have fewer heads than q",
    "dropout_p": "nothing in its place: attention is inference only",
    "softmax_scale": "scale=",
    "sm_scale": "scale=",
    "window_size": "window=: window_size=(w - 1, 0) is window=w",
    "logits_soft_cap": "softcap=",
    "return_attn_probs": "return_lse=",
    "return_softmax_lse": "return_lse=",
    "tensor_layout": "layout=, 'BHTD' (HND) or 'BTHD' (NHD)",
    "kv_layout": "layout=, 'BHTD' (HND) or 'BTHD' (NHD)",
    "cu_seqlens_q": "thrift_attn.attention_varlen",
    "block_table": "thrift_attn.cache.PagedThriftCache",
    "budget": "config=ThriftConfig(budget=...)",
    "base_format": "config=ThriftConfig(base_format=...)",
}
"""What others call an argument, and what to use here."""


def refuse_options(function: str, options: Mapping[str, object]) -> None:
    """Raise TypeError for keywords that a function does not take, naming what it has in place of those of other libraries."""
    for name in options:
        use = f"; use {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        raise TypeError(f"{function}() takes no {name}={use}")


def check_kv_lengths(kv_lengths: Tensor | None, k: Tensor) -> None:
    """Check the number of keys of each sequence, int ``[B]``, against k ``[B, Hkv, Tk, D]``.

    While a CUDA graph is captured values cannot be looked at; the kernels clamp them.

    Raises:
        TypeError: no integer tensor.
        ValueError: another shape, or a length out of range.
    """
    if kv_lengths is None:
        return
    _check_integers("kv_lengths", kv_lengths)
    if kv_lengths.shape != k.shape[:1]:
        raise ValueError(f"kv_lengths must have shape [{k.shape[0]}], got {list(kv_lengths.shape)}")
    if kv_lengths.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if bool((kv_lengths < 1).any()) or bool((kv_lengths > k.shape[2]).any()):
        raise ValueError(f"kv_lengths must be in [1, {k.shape[2]}], got {kv_lengths.tolist()}")


def check_cu_seqlens(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, queries: int, keys: int
) -> None:
    """Check where packed sequences start and end, int ``[B + 1]`` each.

    Values are looked at where they lie on the CPU. On a GPU that would make the host wait for the device, so there the kernels
    clamp them to the tensors instead (`thrift_attn.seq_layout.packed`).

    Args:
        cu_seqlens_q: starts of the sequences in q, and the end of the last.
        cu_seqlens_k: likewise in k.
        max_seqlen_q: at least the queries of the longest sequence.
        max_seqlen_k: at least its keys.
        queries: tokens of q in all.
        keys: tokens of k in all.

    Raises:
        TypeError: no integer tensors, or lengths that are no int.
        ValueError: shapes that do not fit, starts that decrease or leave the tensor, a sequence longer than said.
    """
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_integers(name, x)
        if x.ndim != 1 or len(x) < 2 or len(x) != len(cu_seqlens_q):
            raise ValueError(f"{name} must have shape [B + 1] with B >= 1, got {list(x.shape)}")
    sides = (("q", cu_seqlens_q, max_seqlen_q, queries), ("k", cu_seqlens_k, max_seqlen_k, keys))
    for name, starts, longest, total in sides:
        if isinstance(longest, bool) or not isinstance(longest, int):
            raise TypeError(f"max_seqlen_{name} must be an int, got {type(longest).__name__}")
        if not 1 <= longest <= total:
            raise ValueError(f"max_seqlen_{name} must be in [1, {total}], got {longest}")
        if starts.device.type != "cpu":
            continue
        if int(starts[0]) < 0 or int(starts[-1]) > total or bool((starts.diff() < 0).any()):
            raise ValueError(f"cu_seqlens_{name} must not decrease and lie in [0, {total}], got {_few(starts)}")
        if int(starts.diff().max()) > longest:
            raise ValueError(
                f"max_seqlen_{name} must be at least the longest sequence of cu_seqlens_{name}, "
                f"{int(starts.diff().max())}, got {longest}"
            )


def checked_logits(
    scale: float | None, window: int | None, softcap: float | None, head_dim: int
) -> tuple[float, int | None, float | None]:
    """What shapes the logits, as Python's own numbers; the scale is 1/sqrt(head_dim) by default.

    Raises:
        TypeError: a value of another type.
        ValueError: a scale or a softcap that is not positive and a normal float32, a window below 1.
    """
    limits = torch.finfo(torch.float32)
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
        if not limits.tiny <= value <= limits.max:
            raise ValueError(f"{name} must be a normal float32, {limits.tiny:.3g} to {limits.max:.3g}, got {value!r}")
    if window is not None:
        try:
            window = whole_number("window", window)
        except TypeError:
            raise TypeError(f"window must be an int number of tokens, got {type(window).__name__}") from None
        if not 1 <= window <= MAX_INT:
            raise ValueError(f"window must be at least 1 token and at most {MAX_INT}, got {window}")
    return (
        1 / math.sqrt(head_dim) if scale is None else float(scale),
        window,
        None if softcap is None else float(softcap),
    )


MAX_INT = 2**31 - 1
"""Largest number that the kernels count with."""


def _check_integers(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")


def _few(x: Tensor) -> str:
    """The numbers of a tensor, in short where there are many."""
    numbers = x.tolist()
    return str(numbers) if len(numbers) <= 12 else f"[{', '.join(map(str, numbers[:12]))}, ...]"
