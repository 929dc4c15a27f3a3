r"""The page layout of the decode kernels: where every code and scale of one page lies. Plain PyTorch, no Triton.

A page holds one KV block (64 tokens) of every KV head. One page of one head is a run of 32-bit words in each plane::

    4-bit plane (base, or the ``nested`` residual)          words for D = 128: 2304 (9216 bytes)
    +----------------+--------------+----------------+--------------+
    | K codes        | K scales     | V codes        | V scales     |
    | T x 128 words  | P x 32 words | T x 128 words  | P x 32 words |       T = D / 16 tiles, P = ceil(T / 2) tile pairs
    +----------------+--------------+----------------+--------------+
    8-bit plane (``nested8`` residual): the same with T x 256 words of codes
    16-bit plane (``16bit`` copy): T x 512 words of K, T x 512 words of V, no scales

**Tiles.** K is cut along D: tile t holds dimensions 16t to 16t+15 of all 64 tokens. V is cut along D too, and a V tile is the
transpose of a K tile::

    K tile: row r = token mod 16, column c = dimension mod 16     the four tokens r, 16+r, 32+r, 48+r share one 16-bit word
    V tile: row r = dimension mod 16, column c -> token mod 16    the four tokens c, 16+c, 32+c, 48+c share one 16-bit word

so the element j = 0..3 of every word of a tile is one 16 x 16 operand of a matrix product (token quarter j), and all its
columns lie in one scale group: the scale is one number per row. A V column c = 4q + 2h + e stands for the token 8h + 2q + e
of its quarter: the order in which a matrix accumulator hands its rows on as the next operand.

**Order inside a tile.** Lane l = 4*a + q of a warp (a = 0..7, q = 0..3) owns eight words, 16 contiguous bytes: rows a and 8+a,
columns 4q to 4q+3. That is the fragment of a 16 x 16 matrix operand, so a tile is read with one 16-byte load per lane and
needs no shared memory::

    16-bit word of a tile:  a a a q q h c c      (h: row a or 8+a; c: column 4q+c)
    16-bit plane:           a a a q q w h e      (column 4q + 2w + e of K, token 8w + 2q + e of V; tile index 4t+j)

**A word.** Four e2m1 codes, placed so that a shift and a mask leave a half float of the value times 2^-14 (sign in bit 15,
exponent in bits 11:10, mantissa in bit 9), with M = 0x8E00::

    element 0 =   w              & M
    element 1 =  (w << 3)        & M
    element 2 = ((w << 6) ^ (w << 1)) & M      the second term supplies the sign; what else it brings in
    element 3 = ((w << 9) ^ (w << 2)) & M      was folded into the word when it was packed

    bit of w   15  14  13  12  11  10   9   8   7   6   5   4   3   2   1   0
    holds      s0  s2' s3' s1  e0  e0  m0  e1  e1  m1  e2' e2' m2' e3' e3' m3'        ' = xor of other bits, see below

**An 8-bit word.** e4m3 bytes; tile half m = 0, 1, low byte the token quarter 2m, high byte 2m+1.

**Scales.** One byte per row of a tile and token quarter, four (j = 0..3, lowest byte first) in a 32-bit word::

    word of a tile pair:  a a a h t              (row a or 8+a; tile 2*pair + t)

A byte is bits 14:7 of the half float of 2^7 times the scale (five exponent bits, three of mantissa). Every e4m3 scale fits
exactly; powers of two (mxfp4) fit from 2^-24 to 2^8. Decoding is ``byte << 7``, and code times scale is exact in half
precision for every e4m3 scale, so widened data is off by the factor 2^-7 (`UNIT`) alone. NaN is 0xFF.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.reference.formats import Format
from thrift_attn.reference.quantize import decode_scales

TILE = 16
"""Rows and columns of a tile, and tokens or dimensions that share a scale."""

UNIT = 2.0**-7
"""Widened codes times widened scales are the true values times this."""

MASK = 0x8E00
"""Bits of a half float that an e2m1 value times 2^-14 can set."""


HIGH = {None: 0, "nested": 1, "nested8": 2, "16bit": 3}
"""Numbers by which the kernels know the plane of high precision; None: no block is promoted."""


class PlaneSize(NamedTuple):
    """32-bit words of the parts of one plane of one page and head; V follows K."""

    codes: int
    scales: int

    @property
    def words(self) -> int:
        """Words of K and V together."""
        return 2 * (self.codes + self.scales)


def plane_size(head_dim: int, bits: int) -> PlaneSize:
    """Size of a plane with elements of ``bits`` bits (4, 8 or 16).

    Raises:
        ValueError: a head dimension that is no multiple of 16, or another width.
    """
    if head_dim % TILE or head_dim <= 0:
        raise ValueError(f"pages need a head dimension that is a multiple of {TILE}, got {head_dim}")
    if bits not in (4, 8, 16):
        raise ValueError(f"a plane has 4, 8 or 16 bits per element, got {bits}")
    tiles = head_dim // TILE
    return PlaneSize(tiles * 32 * bits, 0 if bits == 16 else 32 * (-(-tiles // 2)))


# -- words ------------------------------------------------------------------------------------------------------------


def _half_bits(codes: Tensor) -> Tensor:
    """e2m1 codes to the bits of the half float of value * 2^-14, int32."""
    codes = codes.int()
    return ((codes & 8) << 12) | ((codes & 7) << 9)


def _codes(bits: Tensor) -> Tensor:
    return (((bits >> 12) & 8) | ((bits >> 9) & 7)).to(torch.uint8)


def pack_word(codes: Tensor) -> Tensor:
    """Four e2m1 codes to a word: uint8 ``[..., 4]`` to int32 ``[...]`` in 0..65535."""
    h0, h1, h2, h3 = _half_bits(codes).unbind(-1)
    known = h0 | (h1 >> 3)
    x2 = h2 ^ (((known << 6) ^ (known << 1)) & MASK)
    x3 = h3 ^ (((known << 9) ^ (known << 2)) & MASK)
    return known | ((x2 & 0x8000) >> 1) | ((x2 & 0x0E00) >> 6) | ((x3 & 0x8000) >> 2) | ((x3 & 0x0E00) >> 9)


def unpack_word(words: Tensor) -> Tensor:
    """The inverse of `pack_word`: int32 ``[...]`` to uint8 ``[..., 4]``."""
    halves = (words, words << 3, (words << 6) ^ (words << 1), (words << 9) ^ (words << 2))
    return torch.stack([_codes(h & MASK) for h in halves], -1)


def encode_scales(scales: Tensor, fmt: Format) -> Tensor:
    """Scale bytes of a page from the encoded scales of `thrift_attn.quant.quantise`: uint8 of the same shape.

    mxfp4 scales above 2^8 saturate and scales below 2^-24 become zero.
    """
    values = (decode_scales(scales, fmt) / UNIT).clamp(max=2.0**15 * 1.875).half()
    bits = values.view(torch.int16).int() >> 7
    return torch.where(values.isnan(), 0xFF, bits).to(torch.uint8)


def decode_bytes(scales: Tensor) -> Tensor:
    """Float32 scales from the scale bytes of a page."""
    return (scales.int() << 7).to(torch.int16).view(torch.float16).float() * UNIT


# -- planes -----------------------------------------------------------------------------------------------------------


def _k_tiles(x: Tensor) -> Tensor:
    """``[..., 64, D]`` to ``[..., T, row 16, column 16, quarter 4]``."""
    x = x.unflatten(-1, (-1, TILE)).unflatten(-3, (4, TILE))  # [..., j, r, t, c]
    return x.movedim(-2, -4).movedim(-3, -1)


def _v_tiles(x: Tensor) -> Tensor:
    """``[..., 64, D]`` to ``[..., T, row 16, column 16, quarter 4]``, columns in the order of an accumulator."""
    x = x.unflatten(-1, (-1, TILE)).unflatten(-3, (4, 2, 4, 2))  # [..., j, h, q, e, t, r]
    n = x.dim() - 6
    x = x.permute(*range(n), n + 4, n + 5, n + 2, n + 1, n + 3, n)  # [..., t, r, q, h, e, j]
    return x.flatten(-4, -2)


def _from_k_tiles(x: Tensor) -> Tensor:
    return x.movedim(-1, -3).movedim(-4, -2).flatten(-2).flatten(-3, -2)


def _from_v_tiles(x: Tensor) -> Tensor:
    x = x.unflatten(-2, (4, 2, 2))  # [..., t, r, q, h, e, j]
    n = x.dim() - 6
    x = x.permute(*range(n), n + 5, n + 3, n + 2, n + 4, n, n + 1)  # [..., j, h, q, e, t, r]
    return x.flatten(-2).flatten(-5, -2)


def _to_lanes(x: Tensor) -> Tensor:
    """Tiles of words ``[..., 16, 16]`` to ``[..., 256]`` in the order the lanes own."""
    x = x.unflatten(-2, (2, 8)).unflatten(-1, (4, 4))  # [..., h, a, q, c]
    n = x.dim() - 4
    return x.permute(*range(n), n + 1, n + 2, n, n + 3).flatten(-4)


def _from_lanes(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (8, 4, 2, 4))  # [..., a, q, h, c]
    n = x.dim() - 4
    return x.permute(*range(n), n + 2, n, n + 1, n + 3).flatten(-2).flatten(-3, -2)


_COPY_COLUMNS = {"k": (4, 2, 2), "v": (2, 4, 2)}
"""Column of a tile of the 16-bit plane: (q, w, e) for K and (w, q, e) for V, from the highest digit down."""


def _copy_to_lanes(x: Tensor, which: str) -> Tensor:
    """16-bit tiles ``[..., 16, 16]`` to ``[..., 256]``."""
    x = x.unflatten(-1, _COPY_COLUMNS[which])
    if which == "k":
        x = x.transpose(-3, -2)
    x = x.unflatten(-4, (2, 8))  # [..., h, a, w, q, e]
    n = x.dim() - 5
    return x.permute(*range(n), n + 1, n + 3, n + 2, n, n + 4).flatten(-5)


def _copy_from_lanes(x: Tensor, which: str) -> Tensor:
    x = x.unflatten(-1, (8, 4, 2, 2, 2))  # [..., a, q, w, h, e]
    n = x.dim() - 5
    x = x.permute(*range(n), n + 3, n, n + 2, n + 1, n + 4).flatten(-5, -4)  # [..., row, w, q, e]
    return (x.transpose(-3, -2) if which == "k" else x).flatten(-3)


def _pack_scales(scales: Tensor) -> Tensor:
    """Scale bytes ``[..., T, row 16, quarter 4]`` to int32 words ``[..., P * 32]``."""
    if scales.shape[-3] % 2:
        scales = torch.cat([scales, torch.zeros_like(scales[..., :1, :, :])], -3)
    x = scales.unflatten(-2, (2, 8)).unflatten(-4, (-1, 2))  # [..., pair, t, h, a, j]
    n = x.dim() - 5
    return x.permute(*range(n), n, n + 3, n + 2, n + 1, n + 4).contiguous().flatten(-5).view(torch.int32)


def _unpack_scales(words: Tensor, tiles: int) -> Tensor:
    x = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 8, 2, 2, 4))  # [..., pair, a, h, t, j]
    n = x.dim() - 5
    x = x.permute(*range(n), n, n + 3, n + 2, n + 1, n + 4)  # [..., pair, t, h, a, j]
    return x.flatten(-3, -2).flatten(-4, -3)[..., :tiles, :, :]


def _to_words(x: Tensor) -> Tensor:
    """16-bit words in an int32 tensor ``[..., n]`` to the int32 words they fill ``[..., n / 2]``."""
    return x.to(torch.int16).contiguous().view(torch.int32)


def _from_words(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16).int() & 0xFFFF


class Codes(NamedTuple):
    """Codes and scale bytes of K and V in reading order.

    Args:
        k: uint8 ``[..., 64, D]``, one code per element.
        k_scales: uint8 ``[..., 64, D / 16]``, bytes of `encode_scales`.
        v: uint8 ``[..., 64, D]``.
        v_scales: uint8 ``[..., 4, D]``.
    """

    k: Tensor
    k_scales: Tensor
    v: Tensor
    v_scales: Tensor


def pack_plane(data: Codes, bits: int) -> Tensor:
    """One plane of a page: int32 ``[..., plane_size(D, bits).words]``; ``bits`` is 4 or 8."""
    parts = []
    k_scales = data.k_scales.unflatten(-2, (4, TILE)).movedim(-1, -3).movedim(-2, -1)  # [..., T, r, j]
    v_scales = data.v_scales.unflatten(-1, (-1, TILE)).movedim(-3, -1)
    for tiles, scales in ((_k_tiles(data.k), k_scales), (_v_tiles(data.v), v_scales)):
        if bits == 4:
            words = _to_lanes(pack_word(tiles))
        else:
            pairs = tiles.int().unflatten(-1, (2, 2))  # [..., T, r, c, half, byte]
            words = _to_lanes((pairs[..., 0] | (pairs[..., 1] << 8)).movedim(-1, -3)).flatten(-2)
        parts += [_to_words(words).flatten(-2), _pack_scales(scales)]
    return torch.cat(parts, -1)


def unpack_plane(plane: Tensor, head_dim: int, bits: int) -> Codes:
    """The inverse of `pack_plane`."""
    size, tiles = plane_size(head_dim, bits), head_dim // TILE
    out = []
    for part in plane.split(size.words // 2, -1):
        codes, scales = part.split([size.codes, size.scales], -1)
        words = _from_words(codes).unflatten(-1, (tiles, -1))
        if bits == 4:
            quarters = unpack_word(_from_lanes(words))
        else:
            pairs = _from_lanes(words.unflatten(-1, (2, -1))).movedim(-3, -1)  # [..., T, r, c, half]
            quarters = torch.stack([pairs & 0xFF, pairs >> 8], -1).flatten(-2).to(torch.uint8)
        out.append((quarters, _unpack_scales(scales, tiles)))
    (k, k_scales), (v, v_scales) = out
    return Codes(
        _from_k_tiles(k),
        k_scales.movedim(-1, -2).movedim(-3, -1).flatten(-3, -2),
        _from_v_tiles(v),
        v_scales.movedim(-1, -3).flatten(-2),
    )


def pack_copy(k: Tensor, v: Tensor) -> Tensor:
    """The 16-bit plane of a page: two 16-bit ``[..., 64, D]`` to one ``[..., 2 * 64 * D]`` of the same dtype."""
    k_tiles = _k_tiles(k).movedim(-1, -3)  # [..., T, j, r, c]
    v_tiles = v.unflatten(-1, (-1, TILE)).unflatten(-3, (4, TILE))  # [..., j, c, t, r]
    v_tiles = v_tiles.movedim(-2, -4).movedim(-1, -2)  # [..., t, j, r, c]
    return torch.cat([_copy_to_lanes(k_tiles, "k").flatten(-3), _copy_to_lanes(v_tiles, "v").flatten(-3)], -1)


def unpack_copy(plane: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_copy`."""
    k, v = plane.split(BLOCK * head_dim, -1)
    k, v = (x.unflatten(-1, (head_dim // TILE, 4, -1)) for x in (k, v))
    k, v = _copy_from_lanes(k, "k"), _copy_from_lanes(v, "v")  # [..., t, j, r, c]
    v = v.movedim(-2, -1).movedim(-4, -2).flatten(-2).flatten(-3, -2)
    return _from_k_tiles(k.movedim(-3, -1)), v
