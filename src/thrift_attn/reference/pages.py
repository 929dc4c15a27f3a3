"""Blocks to pages and back in plain PyTorch: the twin of `thrift_attn.decode.pack`, and the way pages are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.channel_scales import scales_of_block
from thrift_attn.reference.formats import FORMATS, RESIDUALS, Format
from thrift_attn.reference.page_layout import (
    Codes,
    decode_bytes,
    encode_scales,
    pack_copy,
    pack_plane,
    plane_size,
    unpack_copy,
    unpack_plane,
)
from thrift_attn.reference.planes import Planes
from thrift_attn.reference.quantize import block_means, decode_elements, dequantise, mean_of_others, quantise


class Pool(NamedTuple):
    """The planes of all pages: tensors of their own, or views of records that hold all planes of a page and head.

    Args:
        base: int32 ``[pages, Hkv, words]``, codes and scales of K (minus c_b if ``k_block_mean`` is there) and V.
        k_block_mean: c_b ``[pages, Hkv, D]`` in the activation dtype; where the first token of a sequence is exact, its key is
            that of its block, and its V is 0 in all planes.
        high: int32 residual words ``[slots, Hkv, words]``, or for the ``16bit`` copy ``[slots, Hkv, 128 * D]`` in the
            activation dtype. Where every block keeps it, slots are pages; else each KV head has its own block in a slot
            (`thrift_attn.reference.residents`).
    """

    base: Tensor
    k_block_mean: Tensor
    high: Tensor

    @classmethod
    def empty(
        cls,
        pages: int,
        kv_heads: int,
        head_dim: int,
        high: str,
        dtype: torch.dtype,
        device: torch.device,
        slots: int | None = None,
    ) -> Pool:
        """Planes for ``pages`` pages and ``slots`` slots, by default as many. The content is zero, so that a word no one
        wrote is never read as a number."""
        slots = pages if slots is None else slots
        base = torch.zeros(pages, kv_heads, plane_size(head_dim, 4).words, dtype=torch.int32, device=device)
        k_block_mean = torch.zeros(pages, kv_heads, head_dim, dtype=dtype, device=device)
        if high == "16bit":
            return cls(
                base, k_block_mean, torch.zeros(slots, kv_heads, 2 * BLOCK * head_dim, dtype=dtype, device=device)
            )
        words = plane_size(head_dim, RESIDUALS[high].element_bits).words
        return cls(base, k_block_mean, torch.zeros(slots, kv_heads, words, dtype=torch.int32, device=device))

    @property
    def page_bytes(self) -> float:
        """Bytes of one page over all KV heads and planes, its share of the slots included."""
        return sum(plane.numel() * plane.element_size() for plane in self) / len(self.base)


class SequenceTensors(NamedTuple):
    """What a cache holds once per sequence, beside its pages: all of it comes with the first block.

    Args:
        block0_mean: ``[B, Hkv, D]``, activation dtype: mean of K of the first block without its first token.
        sink_value: ``[B, Hkv, D]``, activation dtype: V of the first token.
        k_channel_scale: float32 ``[B, Hkv, D]``, powers of two: pages hold 4-bit K times it. None: neither K nor V is scaled.
        v_head_scale: float32 ``[B, Hkv]``, likewise for V.
    """

    block0_mean: Tensor
    sink_value: Tensor
    k_channel_scale: Tensor | None
    v_head_scale: Tensor | None

    @classmethod
    def empty(
        cls, batch: int, kv_heads: int, head_dim: int, *, scaled: bool, dtype: torch.dtype, device: torch.device
    ) -> SequenceTensors:
        """Return the tensors of sequences without a complete block: zeros, and scales of 1."""
        mean, sink = (torch.zeros(batch, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        if not scaled:
            return cls(mean, sink, None, None)
        ones = torch.ones(batch, kv_heads, head_dim, device=device)
        return cls(mean, sink, ones, torch.ones(batch, kv_heads, device=device))

    def scales(self) -> tuple[Tensor, Tensor] | None:
        """Return the scales of one sequence for its K ``[Hkv, 1, D]`` and V ``[Hkv, 1, 1]``, if there are any."""
        if self.k_channel_scale is None or self.v_head_scale is None:
            return None
        return self.k_channel_scale[:, None], self.v_head_scale[:, None, None]

    def given(self) -> list[Tensor]:
        """Return those that are there."""
        return [x for x in self if x is not None]

    def each(self, change: Callable[[Tensor], Tensor]) -> SequenceTensors:
        """Return what ``change`` makes of each that is there."""
        return SequenceTensors(
            change(self.block0_mean),
            change(self.sink_value),
            None if self.k_channel_scale is None else change(self.k_channel_scale),
            None if self.v_head_scale is None else change(self.v_head_scale),
        )


def _encode(k: Tensor, v: Tensor, fmt: Format, best: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A plane of K and V ``[..., 64, D]`` and what it decodes to."""
    data = quantise(k, fmt, -1, best=best), quantise(v, fmt, -2, best=best)
    repeat = (fmt.group or BLOCK) // 16  # pages hold one scale per 16 elements
    scales = [
        encode_scales(q.scales, fmt).repeat_interleave(repeat, dim) for q, dim in zip(data, (-1, -2), strict=True)
    ]
    plane = pack_plane(Codes(data[0].codes, scales[0], data[1].codes, scales[1]), fmt.element_bits)
    return plane, dequantise(data[0], fmt, -1), dequantise(data[1], fmt, -2)


def write_blocks(
    pool: Pool,
    pages: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    numerics: DecodeNumerics,
    sequence: SequenceTensors | None = None,
    first: bool = False,
    slots: Tensor | None = None,
    own_scales: bool = True,
) -> None:
    """Pack complete KV blocks of one sequence into pages.

    Args:
        pool: the planes, written at ``pages``.
        pages: int64 ``[n]``.
        k: 16-bit ``[n, Hkv, 64, D]``.
        v: likewise.
        numerics: how blocks are stored.
        sequence: what belongs to the sequence, without the dimension B; written with its first block. None: K and V are not
            scaled, and no block is the first.
        first: whether the first of the blocks is the first of its sequence. Scales are then taken from it, and where the
            first token is exact it becomes the c_b of its block, and its V counts as zero.
        slots: int64 ``[n, Hkv]``, where the plane of promoted blocks goes for each head, below 0 where it is not kept; by
            default to the pages.
        own_scales: whether the first block brings the scales of its sequence. Else they are there before, for all sequences.
    """
    k_block_mean, copy_v = block_means(k)[..., 0, :], v  # [n, Hkv, D]
    if sequence is not None and first and numerics.exact_sink:
        sequence.block0_mean.copy_(mean_of_others(k[0]))
        sequence.sink_value.copy_(v[0, :, 0])
        k_block_mean[0] = k[0, :, 0]
        copy_v = v.clone()
        copy_v[0, :, 0] = 0
    delta = k.float() - k_block_mean.float()[..., None, :] if numerics.centred else k.float()
    scaled_v = copy_v.float()
    if sequence is not None and (scales := sequence.scales()) is not None:
        if first and own_scales:
            of_k, of_v = scales_of_block(k[0], v[0], delta[0], scaled_v[0], numerics.centred)
            scales[0].copy_(of_k[:, None])
            scales[1].copy_(of_v[:, None, None])
        delta, scaled_v = delta * scales[0], scaled_v * scales[1]
    pool.k_block_mean[pages] = k_block_mean
    pool.base[pages], low_k, low_v = _encode(delta, scaled_v, FORMATS[numerics.base_format], numerics.best_scales)
    if numerics.residual is None:
        high = pack_copy(k, copy_v)
    else:
        high = _encode(delta - low_k, scaled_v - low_v, RESIDUALS[numerics.residual], numerics.best_scales)[0]
    if slots is None:
        pool.high[pages] = high
    else:
        block, head = (slots >= 0).nonzero(as_tuple=True)
        pool.high[slots[block, head], head] = high[block, head]


def _decode(plane: Tensor, head_dim: int, fmt: Format) -> tuple[Tensor, Tensor]:
    data = unpack_plane(plane, head_dim, fmt.element_bits)
    k = decode_elements(data.k, fmt) * decode_bytes(data.k_scales).repeat_interleave(16, -1)
    v = decode_elements(data.v, fmt) * decode_bytes(data.v_scales).repeat_interleave(16, -2)
    return k, v


class Blocks(NamedTuple):
    """KV blocks read from pages, float32 ``[n, Hkv, 64, D]``; K without c_b if the pages are centred."""

    low_k: Tensor
    low_v: Tensor
    high_k: Tensor
    high_v: Tensor
    k_block_mean: Tensor  # [n, Hkv, D]


def read_blocks(
    pool: Pool,
    pages: Tensor,
    *,
    numerics: DecodeNumerics,
    sequence: SequenceTensors | None = None,
    slots: Tensor | None = None,
) -> Blocks:
    """What pages decode to: the base, the base refined by the plane of high precision (c_b included), and c_b.

    Where that plane is not kept, the refined data are those of the base.

    Args:
        pool: the planes.
        pages: int64 ``[n]``.
        numerics: how blocks are stored.
        sequence: whose scales are divided out, without the dimension B; None where there are none.
        slots: int64 ``[n, Hkv]`` as in `write_blocks`.
    """
    head_dim = pool.k_block_mean.shape[-1]
    k_block_mean = pool.k_block_mean[pages].float()
    low_k, low_v = _decode(pool.base[pages], head_dim, FORMATS["nvfp4"])
    if slots is None:
        high, there = pool.high[pages], None
    else:
        heads = torch.arange(slots.shape[1], device=slots.device)
        high, there = pool.high[slots.clamp(min=0), heads], (slots >= 0)[..., None, None]
    residual = None if numerics.residual is None else _decode(high, head_dim, RESIDUALS[numerics.residual])
    if sequence is not None and (scales := sequence.scales()) is not None:
        low_k, low_v = low_k / scales[0], low_v / scales[1]
        residual = None if residual is None else (residual[0] / scales[0], residual[1] / scales[1])
    mean = k_block_mean[..., None, :] if numerics.centred else 0
    if residual is None:
        high_k, high_v = (x.float() for x in unpack_copy(high, head_dim))
    else:
        high_k, high_v = mean + (low_k + residual[0]), low_v + residual[1]
    if there is not None:
        high_k, high_v = torch.where(there, high_k, mean + low_k), torch.where(there, high_v, low_v)
    return Blocks(low_k, low_v, high_k, high_v, k_block_mean)


def sequence_planes(
    read: Blocks, kept: Tensor, *, block0_mean: Tensor | None, resident: Tensor | None = None
) -> Planes:
    """One sequence of a cache as attention takes it: complete blocks from pages, then the incomplete one, exact on both paths.

    Args:
        read: its complete blocks, which may be none.
        kept: K and V of the tokens behind them ``[2, Hkv, 0 to 63, D]``.
        block0_mean: ``[Hkv, D]``, what the first block is scored by, where the first token is exact and the block complete.
        resident: bool ``[blocks, Hkv]``, the complete blocks that keep the plane of promoted ones; None: all of them.
    """
    low_k, low_v, high_k, high_v = (x.transpose(0, 1).flatten(1, 2) for x in read[:4])  # [Hkv, T, D]
    k_block_mean = read.k_block_mean.transpose(0, 1)  # [Hkv, N, D]
    if kept.shape[2]:
        block = torch.nn.functional.pad(kept.float(), (0, 0, 0, BLOCK - kept.shape[2]))
        low_k, high_k = (torch.cat([x, block[0]], 1) for x in (low_k, high_k))
        low_v, high_v = (torch.cat([x, block[1]], 1) for x in (low_v, high_v))
        k_block_mean = torch.cat([k_block_mean, torch.zeros_like(block[0, :, :1])], 1)
    if resident is not None:
        resident = torch.nn.functional.pad(resident.T, (0, k_block_mean.shape[1] - len(resident)))
    return Planes(
        low_k,
        low_v,
        high_k,
        high_v,
        k_block_mean,
        block0_mean=None if block0_mean is None else block0_mean.float(),
        exact_tail=True,
        resident=resident,
    )
