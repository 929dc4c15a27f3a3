"""Blocks to pages and back in plain PyTorch: the twin of `thrift_attn.decode.pack`, and the way pages are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
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
from thrift_attn.reference.quantize import block_means, decode_elements, dequantise, mean_of_others, quantise


class Pool(NamedTuple):
    """The planes of all pages.

    Args:
        base: int32 ``[pages, Hkv, words]``, codes and scales of K (minus c_b if ``centres`` is there) and V.
        centres: c_b ``[pages, Hkv, D]`` in the activation dtype; where the first token of a sequence is exact, its key is that
            of its block, and its V is 0 in all planes.
        high: int32 residual words ``[pages, Hkv, words]``, or for the ``16bit`` copy ``[pages, Hkv, 128 * D]`` in the
            activation dtype.
    """

    base: Tensor
    centres: Tensor
    high: Tensor

    @classmethod
    def empty(
        cls, pages: int, kv_heads: int, head_dim: int, high: str, dtype: torch.dtype, device: torch.device
    ) -> Pool:
        """Planes for ``pages`` pages. The content is zero, so that a word no one wrote is never read as a number."""
        base = torch.zeros(pages, kv_heads, plane_size(head_dim, 4).words, dtype=torch.int32, device=device)
        centres = torch.zeros(pages, kv_heads, head_dim, dtype=dtype, device=device)
        if high == "16bit":
            return cls(base, centres, torch.zeros(pages, kv_heads, 2 * BLOCK * head_dim, dtype=dtype, device=device))
        words = plane_size(head_dim, RESIDUALS[high].element_bits).words
        return cls(base, centres, torch.zeros(pages, kv_heads, words, dtype=torch.int32, device=device))

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all KV heads and planes."""
        return sum(plane[0].numel() * plane.element_size() for plane in self)


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
    pool: Pool, pages: Tensor, k: Tensor, v: Tensor, *, low: str, plane: str, centred: bool, best: bool,
    firsts: Tensor | None = None, sinks: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Pack complete KV blocks into pages.

    Args:
        pool: the planes, written at ``pages``.
        pages: int64 ``[n]``.
        k: 16-bit ``[n, Hkv, 64, D]``.
        v: likewise.
        low: ``"nvfp4"`` or ``"mxfp4"``.
        plane: how high precision is stored: ``"nested"``, ``"nested8"`` or ``"16bit"``.
        centred: pack K minus its block mean.
        best: choose the better of the format's scales.
        firsts: see `thrift_attn.decode.pack.pack_blocks`.
        sinks: block0_mean and sink_value ``[B, Hkv, D]``, written for first blocks (`thrift_attn.decode.tensors`).
    """
    centres = block_means(k)[..., 0, :]  # [n, Hkv, D]
    if firsts is not None and sinks is not None:
        first, v = firsts >= 0, v.clone()
        rows = firsts[first].long()
        sinks[0][rows], sinks[1][rows] = mean_of_others(k[first]), v[first][:, :, 0]
        centres[first] = k[first][:, :, 0]
        v[:, :, 0] = torch.where(first[:, None, None], 0, v[:, :, 0])
    delta = k.float() - centres.float()[..., None, :] if centred else k.float()
    pool.centres[pages] = centres
    pool.base[pages], low_k, low_v = _encode(delta, v.float(), FORMATS[low], best)
    if plane == "16bit":
        pool.high[pages] = pack_copy(k, v)
    else:
        pool.high[pages] = _encode(delta - low_k, v.float() - low_v, RESIDUALS[plane], best)[0]


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
    centres: Tensor  # [n, Hkv, D]


def read_blocks(pool: Pool, pages: Tensor, *, plane: str, centred: bool) -> Blocks:
    """What pages decode to: the base, the base refined by the plane of high precision (c_b included), and c_b."""
    head_dim = pool.centres.shape[-1]
    centres = pool.centres[pages].float()
    low_k, low_v = _decode(pool.base[pages], head_dim, FORMATS["nvfp4"])
    if plane == "16bit":
        high_k, high_v = (x.float() for x in unpack_copy(pool.high[pages], head_dim))
    else:
        fine_k, fine_v = _decode(pool.high[pages], head_dim, RESIDUALS[plane])
        mean = centres[..., None, :] if centred else 0
        high_k, high_v = mean + low_k + fine_k, low_v + fine_v
    return Blocks(low_k, low_v, high_k, high_v, centres)
