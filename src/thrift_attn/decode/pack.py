"""Pack and summarise on the device: complete KV blocks of 16-bit K and V to the planes of a page.

The bytes are those of `thrift_attn.reference.quantize.quantise` on K - c_b and V, placed as
`thrift_attn.reference.page_layout` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.decode.pack_kernel import pack_blocks_kernel
from thrift_attn.decode.tensors import CacheTensors
from thrift_attn.kernels.launcher import check_planes, check_rows, launch, on_device_of
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.page_layout import HIGH, TILE, plane_size


def pack_blocks(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    *,
    cache: CacheTensors,
    numerics: DecodeNumerics,
    seqs: Tensor | None = None,
    numbers: Tensor | None = None,
    slots: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """Pack complete KV blocks into pages: base plane, block mean and the plane of promoted blocks.

    Args:
        k: 16-bit ``[n, Hkv, 64, D]``, contiguous in D.
        v: likewise.
        pages: int32 ``[n]``, the page of each block; blocks with a negative page are skipped (so that a graph can be
            captured before it is known which sequence completes a block).
        cache: its planes are written, and for first blocks what belongs to their sequences: ``block0_mean``, ``sink_value``
            and the scales, which are taken from the first block.
        numerics: how blocks are stored.
        seqs: int32 ``[n]``, the sequence of each block. None: blocks of no sequence, without scales and first tokens.
        numbers: int32 ``[n]``, the number of each block in its sequence. Where the first token is exact, it is the c_b of block
            0, and its V counts as zero. No launch may pack block 0 and others of one sequence, which need its scales, unless
            all sequences have one set of them.
        slots: int32 ``[n, Hkv]``, contiguous: where the plane of promoted blocks goes for each head, below 0 where it is not
            kept; by default to the pages.
        overlap: start while the kernel before it ends (programmatic dependent launch).

    Raises:
        ValueError: shapes or strides that do not fit.
        NotImplementedError: another base format.
    """
    if k.shape[2] != BLOCK or v.shape != k.shape or pages.shape != k.shape[:1]:
        raise ValueError(
            f"expected k and v [n, Hkv, {BLOCK}, D] and pages [n], got {list(k.shape)}, {list(v.shape)}, {list(pages.shape)}"
        )
    none = pages  # where nothing is read
    _pack(
        k, v, pages, none, none if seqs is None else seqs, none if numbers is None else numbers, slots, cache, numerics,
        ring=0, of_sequences=seqs is not None, overlap=overlap,
    )  # fmt: skip


def pack_tail(
    pages: Tensor,
    numbers: Tensor,
    *,
    cache: CacheTensors,
    numerics: DecodeNumerics,
    slots: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """Pack a complete block of every sequence from the ring that its tokens lie in: what `write_tail` has found.

    Args:
        pages: int32 ``[B]``, the page of the block of each sequence; sequences with a negative page are skipped.
        numbers: int32 ``[B]``, the number of that block in its sequence.
        cache: as in `pack_blocks`.
        numerics: how blocks are stored.
        slots: int32 ``[B, Hkv]``, as in `pack_blocks`.
        overlap: start while the kernel before it ends (programmatic dependent launch).

    Raises:
        ValueError: shapes or strides that do not fit.
        NotImplementedError: another base format.
    """
    if pages.shape != cache.rings.shape or numbers.shape != pages.shape:
        want = list(cache.rings.shape)
        raise ValueError(f"expected pages and numbers {want}, got {list(pages.shape)} and {list(numbers.shape)}")
    _pack(
        cache.tail[:, 0], cache.tail[:, 1], pages, cache.rings, pages, numbers, slots, cache, numerics,
        ring=cache.tail.shape[3], of_sequences=True, overlap=overlap,
    )  # fmt: skip


def _pack(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    rings: Tensor,
    seqs: Tensor,
    numbers: Tensor,
    slots: Tensor | None,
    cache: CacheTensors,
    numerics: DecodeNumerics,
    *,
    ring: int,
    of_sequences: bool,
    overlap: bool,
) -> None:
    """Start the kernel; ``ring`` is R where k and v are rings, else 0."""
    base_format, plane = numerics.base_format, numerics.promoted_storage
    if base_format not in ("nvfp4", "mxfp4"):
        raise NotImplementedError(f"pages hold nvfp4 or mxfp4, not {base_format}")
    _, kv_heads, _, dim = k.shape
    words = plane_size(dim, 4).words
    if cache.base.shape[1:] != (kv_heads, words):
        raise ValueError(f"expected base [*, {kv_heads}, {words}], got {list(cache.base.shape)}")
    check_rows(k=k, v=v)
    if base_format == "mxfp4" and dim % 32:
        raise ValueError(f"mxfp4 pages need a head dimension that is a multiple of 32, got {dim}")
    sink = numerics.exact_sink and of_sequences
    k_scale, v_scale = cache.k_channel_scale, cache.v_head_scale
    scaled = k_scale is not None and of_sequences
    high = cache.base if cache.high is None else cache.high
    check_planes(base=cache.base, k_block_mean=cache.k_block_mean, high=high)
    with on_device_of(k):
        launch(
            pack_blocks_kernel,
            (len(pages), kv_heads, dim // TILE),
            k,
            v,
            pages,
            cache.k_block_mean,
            cache.base.view(torch.int16),
            cache.base,
            high.view(torch.int16) if plane != "16bit" else high,
            high,
            rings,
            seqs,
            numbers,
            cache.block0_mean,
            cache.sink_value,
            k_scale if scaled else cache.block0_mean,
            v_scale if scaled else cache.block0_mean,
            pages if slots is None else slots,
            *k.stride()[:3],
            *v.stride()[:3],
            **cache.strides("base", "high", "mean", "first"),
            FIRST_IN_PAGE=cache.first_in_page,
            RING=ring,
            HKV=kv_heads,
            D=dim,
            HIGH=HIGH[plane],
            CENTRED=numerics.centred,
            SINK=sink,
            SCALED=scaled,
            FIXED=cache.scales_fixed,
            POWER=base_format == "mxfp4",
            BEST=numerics.best_scales,
            POOLED=slots is not None,
            OVERLAP=overlap,
            launch_pdl=overlap,
            num_warps=1,
        )
