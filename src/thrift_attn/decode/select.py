"""Block scores q.c_b and the choice of promoted blocks, on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.dispatch import interpreted
from thrift_attn.kernels.online_softmax import LOG2E

PORTABLE = interpreted()
"""float32 products of 16-bit data and no inline assembly, for the interpreter."""

MAX_BLOCKS = 16384
"""Most blocks of one sequence: the choice is made by one program per KV head, which holds all scores."""


@triton.jit
def _score(s, block, others, q, inside, scale, SINK: tl.constexpr):
    """Scores [BM] of blocks: the largest logit s [BM, N] of the columns that are inside; with SINK that of block 0 is the
    largest product of ``others`` [DP] with the queries q [DP, N].
    """
    best = tl.max(tl.where(inside[None, :], s, float("-inf")), 1)
    if SINK and tl.program_id(0) == 0:
        product = tl.sum(others[:, None] * q.to(tl.float32), 0) * scale
        best = tl.where(block == 0, tl.max(tl.where(inside, product, float("-inf")), 0), best)
    return best


@triton.jit(do_not_specialize=["blocks"])
def block_scores_kernel(
    q_ptr,  # [B, Hq, Tq, D]
    centre_ptr,  # 16-bit [pages, Hkv, D]
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    bias_ptr,  # float32 [B, Hkv, NB, RP]
    score_ptr,  # float32 [B, Hkv, NB]
    of_queries_ptr,  # 16-bit [Hkv, D], powers of two that queries are multiplied by
    others_ptr,  # 16-bit [B, Hkv, D], what block 0 is scored by in place of its centre
    scale,  # factor of the logits times log2(e)
    stride_qb,
    stride_qh,
    stride_qt,
    blocks,  # NB
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    TQ: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    N: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,  # blocks per program
    LEVELLED: tl.constexpr,
    SINK: tl.constexpr,
    PORTABLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:  # the kernel before it may be the one that writes centres
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    bh = tl.program_id(1)
    b = bh // HKV
    h = bh % HKV
    block = tl.program_id(0) * BM + tl.arange(0, BM)
    # Page numbers do not wait for the length; what stands behind its end is not used.
    page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + block, mask=block < blocks, other=0)
    full = tl.load(lengths_ptr + b) // 64  # complete blocks
    if tl.program_id(0) * BM < full:
        there = block < full
        d = tl.arange(0, DP)
        centre_at = (page * HKV + h).to(tl.int64)[:, None] * D + d[None, :]
        centre = tl.load(centre_ptr + centre_at, mask=there[:, None] & (d < D)[None, :], other=0.0)  # [BM, DP]
        best = tl.full([BM], float("-inf"), tl.float32)
        power = tl.full([DP], 1.0, tl.float32)
        if LEVELLED:
            power = tl.load(of_queries_ptr + h * D + d, mask=d < D, other=1.0).to(tl.float32)
        others = power
        if SINK:
            others = tl.load(others_ptr + bh.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
        q_start = q_ptr + b.to(tl.int64) * stride_qb + (h * GROUP).to(tl.int64) * stride_qh
        for first in tl.static_range(0, RP, N):
            row = first + tl.arange(0, N)
            at = row // GROUP * stride_qt + row % GROUP * stride_qh
            inside = row < GROUP * TQ
            q = tl.load(q_start + at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
            if LEVELLED:
                q = (q.to(tl.float32) * power[:, None]).to(q.dtype)
            if PORTABLE:
                s = tl.dot(centre.to(tl.float32), q.to(tl.float32), input_precision="ieee") * scale
            else:
                s = tl.dot(centre, q) * scale  # [BM, N]
            bias_at = (bh.to(tl.int64) * blocks + block)[:, None] * RP + row[None, :]
            tl.store(bias_ptr + bias_at, s, mask=there[:, None])
            best = tl.maximum(best, _score(s, block, others, q, inside, scale, SINK))
        tl.store(score_ptr + bh.to(tl.int64) * blocks + block, best, mask=there)


@triton.jit
def _keys(score_ptr, block, start, full, total, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Integers in the order of promotion: forced first blocks, forced last ones from the end, by score, hidden ones."""
    there = (block >= start) & (block < full)
    score = tl.load(score_ptr + block, mask=there, other=0.0)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0 and 0 compare equal through the addition
    key = tl.minimum(bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7F800000)  # infinity
    key = tl.where(block >= total - LAST, 0x7F800001 + block - (total - LAST), key)
    key = tl.where(block < FIRST, 0x7FC00000 + FIRST - block, key)
    return tl.where(there, tl.maximum(key, -0x7FFFFFF0), -0x7FFFFFFF)


def _search_asm(keys: int) -> str:
    """PTX of the search for a threshold, one bit per round, by threads that hold ``keys`` keys each.

    All that a round waits for is a barrier that counts the threads whose predicate is true, one for every bit of a thread's own
    count. In: the keys and, for each, the wanted number; out: for each the threshold.
    """
    wanted = f"${2 * keys}"
    count = [line for i in range(keys) for line in (f"setp.ge.s32 p, ${keys + i}, trial;", "@p add.s32 own, own, 1;")]
    total = []
    for i in range(keys.bit_length()):
        total += [f"and.b32 part, own, {1 << i};", "setp.ne.b32 p, part, 0;", "bar.red.popc.u32 part, 0, p;"]
        total += [f"shl.b32 part, part, {i};", "add.s32 all, all, part;"]
    return "\n".join(
        [
            "{ .reg .pred p; .reg .b32 threshold, bit, trial, own, part, all;",
            "mov.b32 threshold, 0x80000000; mov.b32 bit, 0x80000000;",
            "next: xor.b32 trial, threshold, bit;",  # clears the sign first, then sets one bit after the other
            *("mov.b32 own, 0;", *count, "mov.b32 all, 0;", *total),
            f"setp.ge.s32 p, all, {wanted}; @p mov.b32 threshold, trial; shr.u32 bit, bit, 1;",
            f"setp.ne.s32 p, all, {wanted}; setp.ne.and.b32 p, bit, 0, p; @p bra.uni next;",
            *(f"mov.b32 ${i}, threshold;" for i in range(keys)),
            "}",
        ]
    )


@triton.jit(do_not_specialize=["blocks", "window"])
def select_blocks_kernel(
    score_ptr,  # float32 [B, Hkv, NB]
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    budget_ptr,  # int32 [NB + 1]: promoted blocks where so many are listed
    list_ptr,  # int32 [B, Hkv, 2, NB]: block numbers and page numbers, promoted ones first, each part in order
    counts_ptr,  # int32 [B, Hkv, 2]: promoted, all listed
    blocks,  # NB
    window,
    FIRST: tl.constexpr,  # forced first and last blocks
    LAST: tl.constexpr,
    HKV: tl.constexpr,
    TQ: tl.constexpr,
    WINDOW: tl.constexpr,
    PAD: tl.constexpr,  # NB rounded up to a power of two
    KEYS: tl.constexpr,  # of one thread
    SEARCH: tl.constexpr,  # `_search_asm`, and its registers
    REGISTERS: tl.constexpr,
    PORTABLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    bh = tl.program_id(0)
    b = bh // HKV
    length = tl.load(lengths_ptr + b)
    full = length // 64
    total = (length + 63) // 64
    start = full - full
    if WINDOW:
        start = tl.maximum(length - TQ - window + 1, 0) // 64
    listed = tl.maximum(full - start, 0)
    block = tl.arange(0, PAD)
    there = (block >= start) & (block < full)
    page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + block, mask=there, other=0)
    wanted = tl.load(budget_ptr + listed)
    if OVERLAP:  # not earlier, or the programs of the attention take places that the scores still need
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    key = _keys(score_ptr + bh.to(tl.int64) * blocks, block, start, full, total, FIRST, LAST)

    wanted = tl.minimum(tl.maximum(wanted, 0), listed)

    # The largest threshold that at least `wanted` keys reach, bit by bit, or one that exactly so many reach.
    if PORTABLE:
        threshold = wanted - wanted - 0x7FFFFFFF - 1
        bit = 31
        reached = wanted - wanted - 1
        while (bit >= 0) & (reached != wanted):
            # The sign bit counts the other way round.
            trial = tl.where(bit == 31, 0, threshold + (1 << tl.minimum(bit, 30)))
            reached = tl.sum((key >= trial).to(tl.int32), 0)
            threshold = tl.where(reached >= wanted, trial, threshold)
            bit -= 1
    else:
        threshold = tl.inline_asm_elementwise(
            SEARCH, REGISTERS, [key, wanted + tl.zeros([PAD], tl.int32)], dtype=tl.int32, is_pure=False, pack=KEYS
        )
    above = (key > threshold) & there & (wanted > 0)
    ties = (key == threshold) & there & (wanted > 0)
    room = wanted - tl.sum(above.to(tl.int32), 0)
    before = tl.cumsum(above.to(tl.int32) + (ties.to(tl.int32) << 16), 0)  # inclusive; both are less than 2^16
    tied = before >> 16
    chosen = above | (ties & (tied <= room))
    rank = (before & 0xFFFF) + tl.minimum(tied, room)
    place = tl.where(chosen, rank - 1, wanted + block - start - rank)
    out = list_ptr + bh.to(tl.int64) * 2 * blocks + place
    tl.store(out, block, mask=there)
    tl.store(out + blocks, page, mask=there)
    tl.store(counts_ptr + bh * 2, wanted)
    tl.store(counts_ptr + bh * 2 + 1, listed)


def score_blocks(
    q: Tensor,
    centres: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    bias: Tensor,
    scores: Tensor,
    *,
    scale: float,
    of_queries: Tensor | None = None,
    others: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """q.c_b of every complete block, for the logits and for the choice of blocks.

    Args:
        q: queries ``[B, Hq, Tq, D]``, 16-bit, contiguous in D.
        centres: c_b ``[pages, Hkv, D]`` in the dtype of ``q``.
        page_table: int32 ``[B, NB]``.
        lengths: int32 ``[B]``, tokens of each sequence.
        bias: float32 ``[B, Hkv, NB, RP]``, written for complete blocks: logits times log2(e), rows (query, group head).
        scores: float32 ``[B, Hkv, NB]``, written for complete blocks: the largest of these logits, over all new queries
            and the heads of the group.
        scale: factor of the logits.
        of_queries: what queries are multiplied by, in their dtype, Hkv times D numbers
        (`thrift_attn.cache.cache_scales`), or None.
        others: 16-bit ``[B, Hkv, D]``, what block 0 is scored by in place of c_0, or None.
        overlap: start while the kernel before it ends; the next one waits for this one itself (programmatic dependent launch).
    """
    batch, heads, tq, dim = q.shape
    kv_heads, blocks, rows = bias.shape[1:]
    per_program = 64
    block_scores_kernel[(triton.cdiv(blocks, per_program), batch * kv_heads)](
        q,
        centres,
        page_table,
        lengths,
        bias,
        scores,
        q if of_queries is None else of_queries,
        q if others is None else others,
        scale * LOG2E,
        q.stride(0),
        q.stride(1),
        q.stride(2),
        blocks,
        HKV=kv_heads,
        GROUP=heads // kv_heads,
        TQ=tq,
        D=dim,
        DP=triton.next_power_of_2(dim),
        N=16 if rows % 16 == 0 else 8,
        RP=rows,
        BM=per_program,
        LEVELLED=of_queries is not None,
        SINK=others is not None,
        PORTABLE=PORTABLE,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=4,
    )


def select_blocks(
    scores: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    budget: Tensor,
    blocks: Tensor,
    counts: Tensor,
    *,
    tq: int,
    first: int = 0,
    last: int = 1,
    window: int | None = None,
    overlap: bool = False,
) -> None:
    """Choose the promoted blocks of every KV head: forced ones first, then the highest scores, ties to the lower index.

    Args:
        scores: float32 ``[B, Hkv, NB]`` of `score_blocks`.
        page_table: int32 ``[B, NB]``.
        lengths: int32 ``[B]``.
        budget: int32 ``[NB + 1]``: how many blocks to promote where so many complete ones are seen
            (`thrift_attn.reference.budget.promoted_in_decode`).
        blocks: int32 ``[B, Hkv, 2, NB]``, written: numbers of the complete visible blocks, the promoted ones before the others
            and each part in order, and their pages.
        counts: int32 ``[B, Hkv, 2]``, written: how many are promoted, and how many are listed.
        tq: queries per sequence.
        first: forced first blocks.
        last: forced last blocks; the incomplete one is the newest of them.
        window: tokens that a query sees.
        overlap: start while the kernel before ends, and let the next one do so.

    Raises:
        ValueError: more blocks than one program can hold.
    """
    batch, kv_heads, capacity = scores.shape
    if capacity > MAX_BLOCKS:
        raise ValueError(f"the choice of blocks holds at most {MAX_BLOCKS} blocks ({MAX_BLOCKS * BLOCK} tokens)")
    pad = max(32, triton.next_power_of_2(capacity))
    warps = max(1, min(16, pad // 64))
    keys = pad // (32 * warps)
    select_blocks_kernel[(batch * kv_heads,)](
        scores,
        page_table,
        lengths,
        budget,
        blocks,
        counts,
        capacity,
        window or 0,
        FIRST=first,
        LAST=last,
        HKV=kv_heads,
        TQ=tq,
        WINDOW=window is not None,
        PAD=pad,
        KEYS=keys,
        SEARCH=_search_asm(keys),
        REGISTERS=",".join(["=r"] * keys + ["r"] * (2 * keys)),
        PORTABLE=PORTABLE,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=warps,
    )
