"""The merge of what the splits of a decode step found.

A split leaves a normalised output and its LSE for every row of a KV head: a row is a query head of the group at one of the new
tokens, and their number is padded (`padded_rows`).

The V of an exact first token is missing from what the splits found, since no page holds it; its weight is in their sums. It is
added here.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from thrift_attn.decode.block_steps import cap
from thrift_attn.kernels.online_softmax import LOG2E


class Sink(NamedTuple):
    """The first token of every sequence, to be added to what the splits found.

    Args:
        values: its V ``[B, Hkv, D]``, in the units of the pages.
        bias: float32 ``[B, Hkv, NB, RP]`` of `thrift_attn.decode.select.score_blocks`: of block 0 it is the token's logit.
        lengths: int32 ``[B]``; of a sequence of less than 64 tokens it is not needed.
        window: tokens that a query sees, or None.
        softcap: bound of the logits, or None.
    """

    values: Tensor
    bias: Tensor
    lengths: Tensor
    window: int | None
    softcap: float | None


@triton.jit(do_not_specialize=["splits", "window", "blocks"])
def merge_splits_kernel(
    part_ptr,  # float32 [B, Hkv, SPLITS, RP, D]
    part_lse_ptr,  # float32 [B, Hkv, SPLITS, RP], base 2
    out_ptr,  # [B, Hq, Tq, D]
    lse_ptr,  # float32 [B, Hq, Tq], natural
    of_outputs_ptr,  # 16-bit [Hkv], powers of two that outputs are multiplied by
    values_ptr,  # 16-bit [B, Hkv, D]: V of the first token
    bias_ptr,  # float32 [B, Hkv, NB, RP], base 2
    lengths_ptr,  # int32 [B]
    stride_ob,
    stride_oh,
    stride_ot,
    splits,
    window,
    blocks,  # NB
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    TQ: tl.constexpr,
    D: tl.constexpr,
    RP: tl.constexpr,
    PAD: tl.constexpr,  # splits rounded up to a power of two
    SLICE: tl.constexpr,  # dimensions per program, a power of two
    LEVELLED: tl.constexpr,
    SINK: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // HKV
    head = bh % HKV * GROUP + row % GROUP
    step = row // GROUP
    d = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    split = tl.arange(0, PAD)
    start = bh.to(tl.int64) * splits * RP + row
    of_head = 1.0
    if LEVELLED:
        of_head = tl.load(of_outputs_ptr + bh % HKV).to(tl.float32)
    logit = float("-inf")
    value = tl.zeros([SLICE], tl.float32)
    if SINK:  # written before the splits began
        length = tl.load(lengths_ptr + b)
        seen = length >= 64
        if WINDOW:
            seen = seen & (length - TQ + step < window)
        logit = tl.load(bias_ptr + bh.to(tl.int64) * blocks * RP + row, mask=seen, other=float("-inf"))
        if CAP > 0:
            logit = tl.where(seen, cap(logit, 1.0, CAP), logit)
        value = tl.load(values_ptr + bh.to(tl.int64) * D + d, mask=d < tl.where(seen, D, 0), other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    lse = tl.load(part_lse_ptr + start + split * RP, mask=split < splits, other=float("-inf"))  # [PAD]
    part = tl.load(
        part_ptr + (start + split[:, None].to(tl.int64) * RP) * D + d[None, :],
        mask=(split[:, None] < splits) & (d[None, :] < D),
        other=0.0,
    )  # [PAD, SLICE]
    peak = tl.max(lse, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(lse - base)
    mass = tl.sum(weight, 0)
    out = tl.sum(part * weight[:, None], 0)
    if SINK:
        out += value * tl.exp2(logit - base)
    out = out / tl.where(mass > 0, mass, 1.0) * of_head
    at = b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + step * stride_ot
    tl.store(out_ptr + at + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    if tl.program_id(2) == 0:
        natural = tl.where(mass > 0, (peak + tl.log2(mass)) * 0.6931471805599453, float("-inf"))
        tl.store(lse_ptr + (b.to(tl.int64) * HKV * GROUP + head) * TQ + step, natural)


def padded_rows(group: int, tq: int) -> int:
    """Query rows of one KV head as the kernels store them: ``group * tq`` rounded up to 8, or to a multiple of 16."""
    rows = group * tq
    return 8 if rows <= 8 else -(-rows // 16) * 16


def merge_splits(
    parts: Tensor,
    part_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    of_outputs: Tensor | None = None,
    sink: Sink | None = None,
    overlap: bool = False,
) -> None:
    """Merge the splits of `attend_pages`.

    Args:
        parts: float32 ``[B, Hkv, SPLITS, RP, D]``.
        part_lse: float32 ``[B, Hkv, SPLITS, RP]``, base 2.
        out: ``[B, Hq, Tq, D]``, any float dtype, contiguous in D, written; zeros for a row that sees no token.
        lse: float32 ``[B, Hq, Tq]``, contiguous, natural logarithm, written; -inf for a row that sees no token.
        of_outputs: what the output is multiplied by, Hkv numbers (`thrift_attn.cache.cache_scales`), or None.
        sink: the first token, if the pages lack its V.
        overlap: start while the splits end.
    """
    batch, heads, tq, dim = out.shape
    kv_heads, splits, rows = parts.shape[1:4]
    group = heads // kv_heads
    width = triton.next_power_of_2(dim)
    lanes = 32 if splits > 16 else min(width, 128)
    merge_splits_kernel[(group * tq, batch * kv_heads, triton.cdiv(dim, lanes))](
        parts,
        part_lse,
        out,
        lse,
        lse if of_outputs is None else of_outputs,
        *(sink[:3] if sink else (lse, lse, lse)),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        splits,
        (sink and sink.window) or 0,
        sink.bias.shape[2] if sink else 0,
        HKV=kv_heads,
        GROUP=group,
        TQ=tq,
        D=dim,
        RP=rows,
        PAD=triton.next_power_of_2(splits),
        SLICE=lanes,
        LEVELLED=of_outputs is not None,
        SINK=sink is not None,
        WINDOW=sink is not None and sink.window is not None,
        CAP=((sink and sink.softcap) or 0.0) * LOG2E,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=4,
    )
