"""The kernel that combines the splits of a decode step; `thrift_attn.decode.combine_splits` launches it.

Where not all blocks have a residual, programs beside those that combine add what the step's query saw to the past mass of the
blocks (`thrift_attn.reference.residents`). They need only the scores and wait for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.decode.fragments import page_at
from thrift_attn.decode.packed_rows import length_seen, rows_of
from thrift_attn.kernels.arithmetic import softcapped
from thrift_attn.reference.residents import fade

_FADE = tl.constexpr(fade(1))


@triton.jit
def _add_mass(
    past_mass_ptr, scores_ptr, score_lse_ptr, page_table_ptr, bounds_ptr, length, b, h, bh, blocks,
    first_chunk, chunks, HKV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Past mass of the blocks that a sequence holds alone: it fades by one query, and the softmax of the scores is added."""
    # What kernels of this chain wrote is not read from an L1 line of its last replay.
    full = length // 64
    shared = tl.load(bounds_ptr + b * 3 + 2)
    # The sum of 2^score over all blocks, from those of 64 blocks each.
    lse_start = score_lse_ptr + bh.to(tl.int64) * ((blocks + 63) // 64)
    part = tl.arange(0, 1024)  # 65,536 blocks at most
    lse = tl.load(lse_start + part, mask=part < (full + 63) // 64, other=float("-inf"), cache_modifier=".cg")
    peak = tl.max(lse, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    whole = peak + tl.log2(tl.sum(tl.exp2(lse - peak), 0))
    for first in range(first_chunk * CHUNK, full, chunks * CHUNK):
        block = first + tl.arange(0, CHUNK)
        own = (block >= shared) & (block < full)
        page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + block, mask=own, other=0)
        at = past_mass_ptr + page.to(tl.int64) * HKV + h
        mass = tl.load(at, mask=own, other=0.0, cache_modifier=".cg")
        score_at = scores_ptr + bh.to(tl.int64) * blocks + block
        score = tl.load(score_at, mask=own, other=float("-inf"), cache_modifier=".cg")
        weight = tl.exp2(score - whole)
        tl.store(at, mass * _FADE + tl.where(weight == weight, weight, 0.0), mask=own)


@triton.jit(do_not_specialize=["num_splits", "window", "blocks", "tq"])
def combine_splits_kernel(
    partial_out_ptr,  # float32 [B, Hkv, num_splits, RP, D]
    partial_lse_ptr,  # float32 [B, Hkv, num_splits, RP], base 2
    out_ptr,  # [B, Hq, Tq, D], or [tokens, Hq, D] with PACKED
    lse_ptr,  # float32 [B, Hq, Tq], or [tokens, Hq], natural
    starts_ptr,  # int32 [B + 1], with PACKED: the first query of each sequence
    sink_value_ptr,  # 16-bit [B or pages, Hkv, D]: V of the first token
    bias_ptr,  # float32 [B, Hkv, NB, RP], base 2
    lengths_ptr,  # int32 [B]
    first_scores_ptr,  # float32 [B, Hkv, NB], base 2, with POOLED
    score_lse_ptr,  # float32 [B, Hkv, NB / 64], base 2
    past_mass_ptr,  # float32 [pages, Hkv]
    page_table_ptr,  # int32 [B, NB]
    bounds_ptr,  # int32 [B, 3]
    stride_ob,
    stride_oh,
    stride_ot,
    num_splits,
    window,
    blocks,  # NB
    tq,  # Tq, or the most that a sequence has
    FIRST_PAGE: tl.constexpr,  # strides of sink_value
    FIRST_HEAD: tl.constexpr,
    FIRST_IN_PAGE: tl.constexpr,  # its rows are pages
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    RP: tl.constexpr,
    PAD: tl.constexpr,  # num_splits rounded up to a power of two
    BLOCK_D: tl.constexpr,  # dimensions per program, a power of two
    SINK: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    POOLED: tl.constexpr,  # the last programs of the first axis add past mass
    CHUNK: tl.constexpr,  # blocks at a time
    PACKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0)
    bh = tl.program_id(1)
    b = bh // HKV
    query, rows = rows_of(starts_ptr, b, tq, PACKED)
    # Written before the splits began, perhaps by a kernel of this chain: not from an L1 line of its last replay.
    length = length_seen(tl.load(lengths_ptr + b, cache_modifier=".cg"), rows, tq, blocks, PACKED)
    if POOLED:  # noqa: SIM102  (a constant: what is inside is not compiled without)
        if row == GROUP * tq:
            _add_mass(
                past_mass_ptr, first_scores_ptr, score_lse_ptr, page_table_ptr, bounds_ptr, length,
                b, bh % HKV, bh, blocks, tl.program_id(2), tl.num_programs(2), HKV, CHUNK,
            )  # fmt: skip
            return
    head = bh % HKV * GROUP + row % GROUP
    step = row // GROUP
    if PACKED:  # noqa: SIM102
        if step >= rows:  # a row of nobody, or of the next sequence
            return
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.arange(0, PAD)
    start = bh.to(tl.int64) * num_splits * RP + row
    sink_logit = float("-inf")
    sink_value = tl.zeros([BLOCK_D], tl.float32)
    seen = length >= 64
    if SINK:
        if WINDOW:
            seen = seen & (length - rows + step < window)
        visible = d < tl.where(seen, D, 0)
        owner = b
        if FIRST_IN_PAGE:
            owner = tl.load(page_table_ptr + b.to(tl.int64) * blocks, mask=seen, other=0)
        first_at = page_at(owner, bh % HKV, HKV, FIRST_PAGE, FIRST_HEAD)
        sink_value = tl.load(sink_value_ptr + first_at + d, mask=visible, other=0.0, cache_modifier=".cg")
        sink_value = sink_value.to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if SINK:  # what the kernel before this one may have written
        bias_at = bh.to(tl.int64) * blocks * RP + row
        sink_logit = tl.load(bias_ptr + bias_at, mask=seen, other=float("-inf"))
        if CAP > 0:
            sink_logit = tl.where(seen, softcapped(sink_logit, CAP), sink_logit)
    there = split < tl.minimum(num_splits, length // 64 + 4)  # those that had something to do
    lse = tl.load(partial_lse_ptr + start + split * RP, mask=there, other=float("-inf"))  # [PAD]
    part = tl.load(
        partial_out_ptr + (start + split[:, None].to(tl.int64) * RP) * D + d[None, :],
        mask=there[:, None] & (d[None, :] < D),
        other=0.0,
    )  # [PAD, BLOCK_D]
    peak = tl.max(lse, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(lse - base)
    row_sum = tl.sum(weight, 0)
    out = tl.sum(part * weight[:, None], 0)
    if SINK:
        out += sink_value * tl.exp2(sink_logit - base)
    out = out / tl.where(row_sum > 0, row_sum, 1.0)
    at = b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + (query + step) * stride_ot
    tl.store(out_ptr + at + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    if tl.program_id(2) == 0:
        natural = tl.where(row_sum > 0, (peak + tl.log2(row_sum)) * 0.6931471805599453, float("-inf"))
        if PACKED:
            tl.store(lse_ptr + (query + step) * HKV * GROUP + head, natural)
        else:
            tl.store(lse_ptr + (b.to(tl.int64) * HKV * GROUP + head) * tq + step, natural)
