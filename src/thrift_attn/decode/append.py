"""Writing new tokens into the 16-bit blocks, on the device and without knowing the lengths on the host."""

from __future__ import annotations

import triton
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.decode.append_kernel import write_tail_kernel
from thrift_attn.decode.tensors import CacheTensors, check_starts, row_strides
from thrift_attn.kernels.launcher import check_rows, launch, on_device_of


def write_tail(
    k: Tensor,
    v: Tensor,
    *,
    cache: CacheTensors,
    pages: Tensor,
    numbers: Tensor,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    starts: Tensor | None = None,
    most: int | None = None,
) -> None:
    """Write new tokens into the tail of a cache, count them, and say which pages have become complete.

    A sequence that would complete a block for which it has no page is left as it is, and `CacheTensors.overrun` is set.

    Args:
        k: new tokens ``[B, Hkv, T, D]``, contiguous in D; T is at most 64, and leaves room in the ring for the 63 tokens of a
            block that it completes. With ``starts`` packed, ``[tokens, Hkv, D]``.
        v: likewise.
        cache: its ``tail`` and ``lengths`` are written, and which blocks are residents.
        pages: int32 ``[B]``, written: the page of the block that is complete now, else -1.
        numbers: int32 ``[B]``, written: the number in its sequence of the block that ``pages`` has a page for.
        slots: int32 ``[B, Hkv]``, written where ``cache`` has residents: the slot for the residual of the block that
            ``pages`` has a page for, below 0 for none.
        counts: int32 ``[B]``, how many of the T tokens each sequence takes; all by default.
        starts: int32 ``[B + 1]``, contiguous: the first token of each sequence and the end of the last, where they are packed.
        most: T, the most tokens of a sequence, where they are packed. One that has more is left as it is, and
            `CacheTensors.overrun` is set.

    Raises:
        ValueError: more tokens than one step may bring, or shapes and strides that do not fit.
    """
    batch, kv_heads, dim = len(cache.lengths), k.shape[1], k.shape[-1]
    check_starts(k, starts, batch)
    tokens = k.shape[2] if starts is None else most
    if tokens is None:
        raise ValueError("packed tokens need most, the largest number of them that one sequence has")
    cache.check_beside(batch, dim)
    if tokens > (most := min(BLOCK, cache.tail.shape[3] - BLOCK + 1)):
        raise ValueError(f"one step writes at most {most} tokens to rings of {cache.tail.shape[3]}, got {tokens}")
    check_rows(k=k, v=v)
    residents = cache.residents
    if residents is None:
        pooled = (pages,) * 7
    else:
        pooled = (
            slots, residents.slot_of_page, residents.block_of_slot, residents.past_mass, residents.slots, residents.bounds,
            residents.quota,
        )  # fmt: skip
    with on_device_of(k):
        launch(
            write_tail_kernel,
            (batch,),
            k,
            v,
            cache.tail,
            cache.rings,
            cache.page_table,
            cache.lengths,
            pages,
            numbers,
            pages if starts is None else starts,
            pages if counts is None else counts,
            cache.overrun,
            *pooled,
            *row_strides(k),
            *row_strides(v),
            cache.max_blocks,
            tokens,
            0 if residents is None else residents.slots.shape[1],
            **cache.ring_constants,
            HKV=kv_heads,
            D=dim,
            DP=triton.next_power_of_2(dim),
            ROWS=16,
            PACKED=starts is not None,
            RAGGED=counts is not None,
            POOLED=residents is not None,
            HP=triton.next_power_of_2(kv_heads),
            CHUNK=max(16, 1024 // triton.next_power_of_2(kv_heads)),
            num_warps=4,
        )
