"""Writing new tokens into the 16-bit blocks, on the device and without knowing the lengths on the host."""

from __future__ import annotations

import triton
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.decode.append_kernel import write_tail_kernel
from thrift_attn.decode.tensors import CacheTensors
from thrift_attn.kernels.launcher import check_rows, launch, on_device_of


def write_tail(
    k: Tensor,
    v: Tensor,
    *,
    cache: CacheTensors,
    pages: Tensor,
    seqs: Tensor,
    numbers: Tensor,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Write new tokens into the tail of a cache, count them, and say which pages have become complete.

    A sequence that would complete a block for which it has no page is left as it is, and `CacheTensors.overrun` is set.

    Args:
        k: new tokens ``[B, Hkv, T, D]``, T at most 64, contiguous in D.
        v: likewise.
        cache: its ``tail`` and ``lengths`` are written, and which blocks are residents.
        pages: int32 ``[B, 2]``, written: for each tail block the page it goes to if it is complete now, else -1.
        seqs: int32 ``[B, 2]``, written: the sequence of each tail block.
        numbers: int32 ``[B, 2]``, written: the number in its sequence of the block that ``pages`` has a page for.
        slots: int32 ``[B, 2, Hkv]``, written where ``cache`` has residents: the slot for the residual of the block that
            ``pages`` has a page for, below 0 for none.
        counts: int32 ``[B]``, how many of the T tokens each sequence takes; all by default.

    Raises:
        ValueError: more than 64 tokens, or strides that do not fit.
    """
    batch, kv_heads, tokens, dim = k.shape
    if tokens > BLOCK:
        raise ValueError(f"one step writes at most {BLOCK} tokens, got {tokens}")
    check_rows(k=k, v=v)
    if not cache.tail.is_contiguous():
        raise ValueError(f"the tail must be contiguous, got strides {cache.tail.stride()}")
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
            cache.page_table,
            cache.lengths,
            pages,
            seqs,
            numbers,
            pages if counts is None else counts,
            cache.overrun,
            *pooled,
            *k.stride()[:3],
            *v.stride()[:3],
            cache.max_blocks,
            batch,
            tokens,
            0 if residents is None else residents.slots.shape[1],
            HKV=kv_heads,
            D=dim,
            DP=triton.next_power_of_2(dim),
            ROWS=16,
            RAGGED=counts is not None,
            POOLED=residents is not None,
            HP=triton.next_power_of_2(kv_heads),
            CHUNK=max(16, 1024 // triton.next_power_of_2(kv_heads)),
            num_warps=4,
        )
