"""The public call: check the input, pick a backend, attend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from thrift_attn.checks import (
    check_cu_seqlens,
    check_flag,
    check_kv_lengths,
    check_qkv,
    check_strided,
    checked_logits,
    refuse_options,
    to_bhtd,
    warn_of_bthd,
)
from thrift_attn.config import Layout, ThriftConfig
from thrift_attn.dispatch import Served, serve
from thrift_attn.exact import Call, attend_exact, exact_stats
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.reference import attention as reference
from thrift_attn.reference.formats import FORMATS
from thrift_attn.seq_layout import dense, packed, padded
from thrift_attn.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Unpack

    class _Options(TypedDict, total=False):
        config: ThriftConfig | None
        causal: bool
        scale: float | None
        window: int | None
        softcap: float | None
        kv_lengths: Tensor | None
        layout: Layout
        backend: str


_DEFAULT = ThriftConfig()


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
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = ..., return_stats: bool = ..., **options: Unpack[_Options]
) -> tuple[Any, ...]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: ThriftConfig | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    kv_lengths: Tensor | None = None,
    layout: Layout = "BHTD",
    backend: str = "auto",
    return_lse: bool = False,
    return_stats: bool = False,
    **elsewhere: NoReturn,
) -> Tensor | tuple[Any, ...]:
    """Attention with most query-key blocks in low precision and a budget of important ones in high precision.

    Queries are right-aligned: query i of a sequence with L keys sits at position L - Tq + i, so Tq < Tk is chunked
    prefill and Tq = 1 is decode. Up to 16 new tokens count as decode: all query heads of a KV head share one list of
    promoted blocks; longer calls choose per query head and block of 64 positions.

    The default configuration looks ahead: with ``center="all"`` what a query is rounded less of is a mean over all queries
    of the call, later ones too, and powers of two come from all keys and values. The logits that causal masking hides never
    enter, but the 4-bit noise of a token depends on tokens after it. With
    ``center="block", smooth="none"`` a token looks no further than its block of 64 (in fp8 the scale of V is one per head).

    Args:
        q: ``[B, Hq, Tq, D]``, float16, bfloat16, float32 or float64. Any D; it is filled up with zeros to a multiple of 16
            (mxfp4: 32), which changes no result.
        k: ``[B, Hkv, Tk, D]``, the dtype and device of ``q``; Hkv divides Hq.
        v: the shape of ``k``.
        config: what is computed, see `ThriftConfig`; None for the default.
        causal: whether a query sees only keys up to its own position.
        scale: factor of the logits; 1/sqrt(D) by default.
        window: sliding window in tokens: a query at position p sees keys j with p - j < window; without a causal mask
            those with |p - j| < window, which flash-attention calls ``window_size=(window - 1, window - 1)``. None for all.
        softcap: logits become softcap * tanh(logits / softcap). None for no cap.
        kv_lengths: int ``[B]``: row b has keys ``k[b, :, :kv_lengths[b]]``; under a causal mask queries before its position 0
            give 0 and LSE -inf. None when all rows have Tk keys.
        layout: ``"BHTD"``; or ``"BTHD"``, flash-attention's order, for q, k, v and the output. Shapes are named in the former
            here and in errors. A warning says so where shapes look like the other one.
        backend: ``"reference"``, plain PyTorch; ``"triton"``, the kernels; or ``"auto"``: exact 16-bit attention where that is
            faster (``exact_below`` of `ThriftConfig`), the kernels on a CUDA device for what they serve, else the reference.
            See `thrift_attn.support`.
        return_lse: also return the log-sum-exp of the logits, natural logarithm ``[B, Hq, Tq]``, float32 (float64 for
            float64 input).
        return_stats: also return `Stats`: pairs promoted, asked and visible, and softmax mass per path. Copies them to the
            host.
        **elsewhere: none; names that other libraries have, such as ``is_causal``, are refused with the one that is here.

    Returns:
        The output ``[B, Hq, Tq, D]`` in the dtype and layout of ``q``, followed by the LSE and the statistics if asked for.

    Raises:
        ValueError: shapes that do not fit, options out of range.
        TypeError: wrong or mixed dtypes, unknown arguments.
        NotImplementedError: gradients, or a backend that cannot serve the call.

    Source: ThriftAttention, arXiv 2605.23081.
    """
    refuse_options("attention", elsewhere)
    for name, flag in (("causal", causal), ("return_lse", return_lse), ("return_stats", return_stats)):
        check_flag(name, flag)
    q, k, v = to_bhtd(layout, q, k, v)
    if layout == "BHTD" and kv_lengths is None:
        warn_of_bthd(q, k, causal)
    found = attend(
        q, k, v, config=config, causal=causal, scale=scale, window=window, softcap=softcap, kv_lengths=kv_lengths,
        backend=backend, return_lse=return_lse, return_stats=return_stats,
    )  # fmt: skip
    if layout == "BTHD":
        found = found._replace(out=found.out.transpose(1, 2).contiguous())
    returned = (found.out, *(found.lse,) * return_lse, *(found.stats,) * return_stats)
    return returned if len(returned) > 1 else found.out


class Attended(NamedTuple):
    """What `attend` returns: output, LSE (None if it was not asked for and did not come up), statistics, and what ran."""

    out: Tensor
    lse: Tensor | None
    stats: Stats
    served: Served


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: ThriftConfig | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    kv_lengths: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    return_stats: bool = False,
) -> Attended:
    """`attention`, which also tells what ran."""
    config = _checked(config)
    q, k, v = _under_autocast(q, k, v)
    check_qkv(q, k, v)
    head_dim = q.shape[3]
    scale, window, softcap = checked_logits(scale, window, softcap, head_dim)
    check_kv_lengths(kv_lengths, k)
    with _inference(q.device):
        q, k, v = _whole_groups(config, q, k, v)
        call = Call(
            device=q.device, dtype=q.dtype, head_dim=q.shape[3], queries=q.shape[2], keys=k.shape[2], causal=causal,
            window=window, softcap=softcap, lse=return_lse,
        )  # fmt: skip
        if kv_lengths is None:
            found = _attend(q, k, v, serve(backend, config, call), call, None, scale, return_stats)
        elif q.is_cuda and torch.cuda.is_current_stream_capturing():  # lengths cannot be looked at
            lengths_unknown = serve(backend, config, replace(call, packed=True))
            found = _attend(q, k, v, lengths_unknown, call, kv_lengths, scale, return_stats)
        else:
            lengths = kv_lengths.tolist()
            plans = [serve(backend, config, _row_of(call, n)) for n in lengths]
            found = _attend_rows(q, k, v, plans, call, kv_lengths, lengths, scale, return_stats)
        return found._replace(out=found.out[..., :head_dim])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    served: Served,
    call: Call,
    kv_lengths: Tensor | None,
    scale: float,
    return_stats: bool,
) -> Attended:
    """Compute a call by what has been chosen for all of its rows."""
    config, causal = served.config, call.causal
    logits = {"scale": scale, "window": call.window, "softcap": call.softcap}
    if served.by == "exact":
        out, lse = attend_exact(q, k, v, causal=causal, scale=scale, softcap=call.softcap, lse=call.lse)
        return Attended(out, lse, exact_stats(call, q.shape[0] * q.shape[1]), served)
    if served.by == "reference":
        numerics, spans = PrefillNumerics.resolve(config), reference.batch_spans(q, k, kv_lengths)
        return Attended(*reference.attend(q, k, v, numerics, spans, causal=causal, **logits), served)
    from thrift_attn.prefill import ops  # needs Triton, which the reference does not

    if kv_lengths is None:
        sequences = dense(q.shape[0], q.shape[2], k.shape[2], causal, q.device)
    else:
        sequences = padded(q.shape[2], k.shape[2], causal, kv_lengths.to(q.device))
    out, lse, counts, share = ops.prefill(
        q, k, v, sequences, config, served.form, high_fraction=return_stats, **logits
    )  # fmt: skip
    stats = Stats()
    if return_stats:
        stats = ops.prefill_stats(sequences, config, q.shape[1], counts, share, call.window)
    return Attended(out, lse, stats, served)


def _row_of(call: Call, keys: int) -> Call:
    """The facts of a row that has so many keys: under a causal mask, no query from before its first key."""
    return replace(call, queries=min(call.queries, keys) if call.causal else call.queries, keys=keys)


def _attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plans: list[Served],
    call: Call,
    kv_lengths: Tensor,
    lengths: list[int],
    scale: float,
    return_stats: bool,
) -> Attended:
    """Compute a batch whose rows have lengths of their own, each row as it is computed alone.

    Rows that are exact go one by one, without their padding; the others go together.
    """
    if len(set(plans)) == 1 and plans[0].by != "exact":
        return _attend(q, k, v, plans[0], call, kv_lengths, scale, return_stats)
    out, lse = torch.zeros_like(q), None
    if call.lse:
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    stats, told = Stats(), plans[0]
    for plan in dict.fromkeys(plans):
        rows = [row for row, its in enumerate(plans) if its == plan]
        if plan.by != "exact":
            at = torch.tensor(rows, device=q.device)
            found = _attend(q[at], k[at], v[at], plan, call, kv_lengths[rows], scale, return_stats)
            out[at], stats = found.out, stats + found.stats
            if lse is not None and found.lse is not None:
                lse[at] = found.lse
            continue
        for row in rows:
            n = lengths[row]
            own = _row_of(call, n)
            here = slice(row, row + 1), slice(None), slice(call.queries - own.queries, None)
            keys = slice(row, row + 1), slice(None), slice(n)
            found = _attend(q[here], k[keys], v[keys], plan, own, None, scale, return_stats)
            out[here], stats = found.out, stats + found.stats
            if lse is not None and found.lse is not None:
                lse[here] = found.lse
    others = [plan for plan in plans if plan.by != "exact"]
    if 0 < len(others) < len(plans):
        told = others[0]._replace(why="short rows exactly")
    return Attended(out, lse, stats, told)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    config: ThriftConfig | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    **elsewhere: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences packed end to end; nothing is copied to the host on the kernels' path.

    Every query head and block of 64 positions has its own list of promoted blocks, also in sequences of up to 16 queries.
    Sequences of fewer keys than ``exact_below`` (see `ThriftConfig`) promote every block, each by its own length.
    Queries outside of all sequences, and of sequences without keys, give 0 and LSE -inf.

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
        **elsewhere: none, see `attention`.

    Returns:
        The output, the shape and dtype of ``q``, followed by the LSE if asked for.

    Raises:
        ValueError: shapes that do not fit, options out of range, starts that decrease or leave the tensor, or a sequence
            longer than said. Starts on a GPU are not looked at but clamped, since looking would wait for the device.
        TypeError: wrong or mixed dtypes, unknown arguments.
        NotImplementedError: gradients, or a backend that cannot serve the call.
    """
    refuse_options("attention_varlen", elsewhere)
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        check_flag(name, flag)
    config = _checked(config)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_strided(name, x)
        if x.ndim != 3:
            raise ValueError(f"{name} must have 3 dimensions [tokens, H, D], got shape {list(x.shape)}")
    q, k, v = _under_autocast(*(x.transpose(0, 1)[None] for x in (q, k, v)))
    check_qkv(q, k, v)
    queries, keys, head_dim = q.shape[2], k.shape[2], q.shape[3]
    scale, window, softcap = checked_logits(scale, window, softcap, head_dim)
    check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, queries, keys)
    logits = {"scale": scale, "window": window, "softcap": softcap}
    with _inference(q.device):
        q, k, v = _whole_groups(config, q, k, v)
        call = Call(
            device=q.device, dtype=q.dtype, head_dim=q.shape[3], queries=max_seqlen_q, keys=max_seqlen_k, causal=causal,
            window=window, softcap=softcap, lse=return_lse, packed=True,
        )  # fmt: skip
        served = serve(backend, config, call)
        config = served.config
        if served.by == "reference":
            numerics, spans = PrefillNumerics.resolve(config), reference.packed_spans(cu_seqlens_q, cu_seqlens_k)
            out, lse, _ = reference.attend(q, k, v, numerics, spans, causal=causal, decode=False, **logits)
        else:
            from thrift_attn.prefill import ops  # needs Triton, which the reference does not

            starts = cu_seqlens_q.to(q.device), cu_seqlens_k.to(q.device)
            sizes = {"queries": queries, "keys": keys, "max_queries": max_seqlen_q, "max_keys": max_seqlen_k}
            sequences = packed(*starts, **sizes, causal=causal)
            out, lse, *_ = ops.prefill(q, k, v, sequences, config, served.form, **logits)
        out = out[0, ..., :head_dim].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def _checked(config: ThriftConfig | None) -> ThriftConfig:
    """Return the configuration, or the default one for None."""
    if config is None:
        return _DEFAULT
    if not isinstance(config, ThriftConfig):
        raise TypeError(f"config must be a ThriftConfig or None, got {type(config).__name__}")
    return config


@contextmanager
def _inference(device: torch.device) -> Iterator[None]:
    """Compute without gradients, and without autocast, which would round products that are meant to be exact."""
    with torch.no_grad():
        if not torch.amp.is_autocast_available(device.type):
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to the dtype of autocast where it is on, as PyTorch does for its own attention; float64 stays."""
    device = next((x.device.type for x in tensors if isinstance(x, Tensor)), "cpu")
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype, cast = torch.get_autocast_dtype(device), (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in cast else x for x in tensors)


def _whole_groups(config: ThriftConfig, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Fill the head dim up with zeros to whole groups of the formats: a multiple of 16, of mxfp4 of 32.

    Zeros change no product, no mean, and no scale of a group of others; the caller cuts the output.
    """
    group = max(16, FORMATS[config.base_format].group or 0) if config.base_format in FORMATS else 16
    lacking = -tensors[0].shape[-1] % group
    return tuple(F.pad(x, (0, lacking)) for x in tensors) if lacking else tensors
