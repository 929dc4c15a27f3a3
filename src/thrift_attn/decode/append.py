"""Writing new tokens into the 16-bit slots, on the device and without knowing the lengths on the host."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from thrift_attn.config import BLOCK


@triton.jit
def write_tail_kernel(
    k_ptr,  # [B, Hkv, T, D]
    v_ptr,
    tail_ptr,  # [2, B, 2, Hkv, 64, D], contiguous
    page_table_ptr,  # int32 [B, NB]
    lengths_ptr,  # int32 [B]
    pages_ptr,  # int32 [B, 2]: the page of the block that slot s completes, or -1
    firsts_ptr,  # int32 [B, 2]: the sequence whose first block that is, or -1
    of_k_ptr,  # [Hkv, D], powers of two that K is multiplied by
    of_v_ptr,  # [Hkv]
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    blocks,  # NB
    BATCH: tl.constexpr,
    HKV: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two
    ROWS: tl.constexpr,  # (token, head) pairs at a time
    LEVELLED: tl.constexpr,
):
    b = tl.program_id(0)
    length = tl.load(lengths_ptr + b)
    d = tl.arange(0, DP)[None, :]
    for start in range(0, T * HKV, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        token, head = (row // HKV).to(tl.int64), (row % HKV).to(tl.int64)
        there = (row < T * HKV) & (d < D)
        k = tl.load(k_ptr + b.to(tl.int64) * stride_kb + head * stride_kh + token * stride_kt + d, mask=there)
        v = tl.load(v_ptr + b.to(tl.int64) * stride_vb + head * stride_vh + token * stride_vt + d, mask=there)
        if LEVELLED:
            k = (k.to(tl.float32) * tl.load(of_k_ptr + head * D + d, mask=there).to(tl.float32)).to(k.dtype)
            v = (v.to(tl.float32) * tl.load(of_v_ptr + head).to(tl.float32)).to(v.dtype)
        at = length + token
        out = (((b.to(tl.int64) * 2 + at // 64 % 2) * HKV + head) * 64 + at % 64) * D + d
        tl.store(tail_ptr + out, k, mask=there)
        tl.store(tail_ptr + BATCH * 2 * HKV * 64 * D + out, v, mask=there)
    # At most 64 tokens complete at most one block: the one that held the old end.
    full = (length % 64 + T) >= 64
    page = tl.load(page_table_ptr + b.to(tl.int64) * blocks + length // 64, mask=full, other=-1)
    side = length // 64 % 2
    tl.store(pages_ptr + b * 2 + side, page)
    tl.store(pages_ptr + b * 2 + 1 - side, -1)
    tl.store(firsts_ptr + b * 2 + side, tl.where(length < 64, b, -1))
    tl.store(firsts_ptr + b * 2 + 1 - side, -1)
    tl.debug_barrier()  # every warp has read the old length
    tl.store(lengths_ptr + b, length + T)  # no other program reads it


def write_tail(
    k: Tensor,
    v: Tensor,
    tail: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    pages: Tensor,
    firsts: Tensor,
    of_keys: Tensor | None = None,
    of_values: Tensor | None = None,
) -> None:
    """Write new tokens into the slots of the two newest blocks, count them, and say which pages have become complete.

    Args:
        k: new tokens ``[B, Hkv, T, D]``, T at most 64, contiguous in D.
        v: likewise.
        tail: ``[2, B, 2, Hkv, 64, D]``: K and V, slots, written.
        page_table: int32 ``[B, NB]``.
        lengths: int32 ``[B]``, before the new tokens; grows by T.
        pages: int32 ``[B, 2]``, written: for each slot the page its block goes to if it is complete now, else -1.
        firsts: int32 ``[B, 2]``, written: the number of the sequence if that is its first block, else -1.
        of_keys: what K is multiplied by, Hkv times D numbers (`thrift_attn.cache.cache_scales`), or None for neither K nor V.
        of_values: what V is multiplied by, Hkv numbers.
    """
    batch, kv_heads, count, dim = k.shape
    if count > BLOCK:
        raise ValueError(f"one step writes at most {BLOCK} tokens, got {count}")
    write_tail_kernel[(batch,)](
        k,
        v,
        tail,
        page_table,
        lengths,
        pages,
        firsts,
        k if of_keys is None else of_keys,
        v if of_values is None else of_values,
        *k.stride()[:3],
        *v.stride()[:3],
        page_table.shape[1],
        BATCH=batch,
        HKV=kv_heads,
        T=count,
        D=dim,
        DP=triton.next_power_of_2(dim),
        ROWS=16,
        LEVELLED=of_keys is not None,
        num_warps=4,
    )
