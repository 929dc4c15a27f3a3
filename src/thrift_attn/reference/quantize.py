"""Quantisation in plain PyTorch, exact to the definitions of `thrift_attn.reference.formats`.

Scales and codes are always worked out in float32, as the kernels do: ``scale = round(amax / top)``, then
``code = round(x / scale)`` with true divisions, round to nearest even and saturation. With ``best=True`` every top of the
format is tried and each group keeps the scale with the smallest squared error, the first one if they tie.

Zero groups, and groups whose scale rounds to zero, decode to 0. A NaN or an infinity anywhere in a group makes the scale of
the group NaN, so that the whole group decodes to NaN and the fault stays visible.

Two e2m1 codes share a byte, the even element in the low nibble (the order of torch.float4_e2m1fn_x2)::

    byte i   | 7 6 5 4 | 3 2 1 0 |        code | 3    | 2 1      | 0        |
    element  |  2i + 1 |   2i    |             | sign | exponent | mantissa |

The kernels' own page layout is documented in `thrift_attn.reference.page_layout`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.reference.formats import E2M1_MAX, E2M1_VALUES, E4M3_MAX, Format

_EXPONENT = 0x7F800000  # exponent field of a float32
_ONE = 0x3F800000  # bits of 1.0
_E8M0_NAN = 0xFF


class Quantised(NamedTuple):
    """Codes and scales of a tensor.

    Args:
        codes: uint8, one code per element (e2m1 in the low four bits, or an e4m3 byte), the shape of the input.
        scales: uint8 bits of e4m3 or e8m0, or float32; the grouped dimension is divided by the group size. For ``fp8`` the
            shape is ``[..., ceil(T / 64)]``.
    """

    codes: Tensor
    scales: Tensor


def round_e2m1(x: Tensor) -> Tensor:
    """Round float32 values to the nearest e2m1 value, ties to even, saturating at 6."""
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    # The spacing of e2m1 at x is 2^(max(exponent, 0) - 1). Adding and subtracting 1.5 * 2^23 spacings makes the float32
    # adder round to a multiple of the spacing, ties to even.
    magic = x.view(torch.int32).bitwise_and(_EXPONENT).clamp_(min=_ONE).view(torch.float32) * (0.75 * 2**23)
    return x.add_(magic).sub_(magic)


def _round_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _scale_bits(amax: Tensor, fmt: Format, top: float) -> Tensor:
    """Encoded scale of groups with the float32 maxima ``amax``; NaN where ``amax`` is not finite."""
    if fmt.scale == "e8m0":
        shift = int(top).bit_length() - 1
        exponent = ((amax.view(torch.int32) >> 23) - shift).clamp(0, 254).to(torch.uint8)
        return torch.where(amax.isfinite(), exponent, _E8M0_NAN)
    ratio = torch.where(amax.isfinite(), amax, torch.nan) / top
    return ratio if fmt.scale == "float32" else _round_e4m3(ratio).view(torch.uint8)


def decode_scales(scales: Tensor, fmt: Format) -> Tensor:
    """Float32 values of encoded scales."""
    if fmt.scale == "float32":
        return scales
    if fmt.scale == "e4m3":
        return scales.view(torch.float8_e4m3fn).float()
    bits = torch.where(scales == 0, 1 << 22, scales.int() << 23)  # 2^-127 is a subnormal float32
    return torch.where(scales == _E8M0_NAN, torch.nan, bits.view(torch.float32))


def _grouped(x: Tensor, fmt: Format, dim: int) -> Tensor:
    """View with the elements that share a scale in the last dimension: ``[..., groups, group]``."""
    if fmt.group is None:
        blocks = -(-x.shape[-2] // BLOCK)
        pad = blocks * BLOCK - x.shape[-2]
        return torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(-2, (blocks, BLOCK)).flatten(-2)
    x = x.movedim(dim, -1)
    if x.shape[-1] % fmt.group:
        raise ValueError(f"{fmt.name} needs a multiple of {fmt.group} elements along dim {dim}, got {x.shape[-1]}")
    return x.unflatten(-1, (x.shape[-1] // fmt.group, fmt.group))


def _ungrouped(x: Tensor, fmt: Format, dim: int, shape: torch.Size) -> Tensor:
    if fmt.group is None:
        return x.unflatten(-1, (BLOCK, shape[-1])).flatten(-3, -2)[..., : shape[-2], :]
    return x.flatten(-2).movedim(-1, dim)


class _Rounded(NamedTuple):
    """Groups after rounding: elements in units of the scale, and encoded and decoded scales ``[..., groups, 1]``."""

    ratio: Tensor
    elements: Tensor
    bits: Tensor
    scale: Tensor


def _round_groups(groups: Tensor, fmt: Format, top: float) -> _Rounded:
    bits = _scale_bits(groups.abs().amax(-1, keepdim=True), fmt, top)
    scale = decode_scales(bits, fmt)
    # x / inf = 0: a scale that rounded to zero makes every code zero.
    ratio = groups / torch.where(scale == 0, torch.inf, scale)
    return _Rounded(ratio, round_e2m1(ratio) if fmt.element == "e2m1" else _round_e4m3(ratio).float(), bits, scale)


def _round(groups: Tensor, fmt: Format, best: bool) -> _Rounded:
    """Round groups with the format's own scale, or with the best of its tops."""
    chosen = _round_groups(groups, fmt, fmt.tops[0])
    for top in fmt.tops[1:] if best else ():
        other = _round_groups(groups, fmt, top)
        errors = [(r.elements * r.scale - groups).square().sum(-1, keepdim=True) for r in (chosen, other)]
        chosen = _Rounded(*(torch.where(errors[1] < errors[0], o, c) for o, c in zip(other, chosen, strict=True)))
    return chosen


def _as_float(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"expected a floating point tensor, got {x.dtype}")
    return x.float()


def quantise(x: Tensor, fmt: Format, dim: int = -1, *, best: bool = False) -> Quantised:
    """Quantise a tensor.

    Args:
        x: floating point, any shape; ``[..., T, D]`` for a format that shares one scale in a KV block.
        fmt: a row of `FORMATS`.
        dim: the contraction, along which groups are formed. Ignored by block-scaled formats.
        best: try every top of the format and keep the best scale of each group.

    Returns:
        `Quantised` codes and scales.

    Raises:
        ValueError: the length along ``dim`` is no multiple of the group.
        TypeError: not floating point.

    Source: OCP MX 1.0 (mxfp4); NVFP4 as in arXiv 2605.23081 section 3, without a tensor scale; the choice between 6 and 4
    is Four Over Six, arXiv 2512.02010.
    """
    x = _as_float(x)
    ratio, elements, bits, scale = _round(_grouped(x, fmt, dim), fmt, best)
    if fmt.element == "e2m1":
        magnitude = elements.abs()
        codes = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
        codes = codes.nan_to_num(0).to(torch.uint8) | (ratio.signbit().to(torch.uint8) << 3)
    else:
        codes = _round_e4m3(elements.nan_to_num(0)).view(torch.uint8)
    # Groups without a usable scale (zero or NaN) carry zero codes: the scale alone says what they decode to.
    codes = torch.where(scale > 0, codes, 0)
    scales = bits.squeeze(-1)
    if fmt.group is not None:
        scales = scales.movedim(-1, dim)
    return Quantised(_ungrouped(codes, fmt, dim, x.shape), scales)


def decode_elements(codes: Tensor, fmt: Format) -> Tensor:
    """Float32 values of codes in units of their scale."""
    if fmt.element == "e2m1":
        magnitudes = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=codes.device)
        return torch.cat([magnitudes, -magnitudes])[codes.int()]
    return codes.view(torch.float8_e4m3fn).float()


def dequantise(q: Quantised, fmt: Format, dim: int = -1) -> Tensor:
    """Float32 values of `Quantised` data, the shape of the codes; the inverse of `quantise`."""
    values = decode_elements(q.codes, fmt)
    scales = q.scales if fmt.group is None else q.scales.movedim(dim, -1)
    scale = decode_scales(scales, fmt).unsqueeze(-1)
    return _ungrouped(_grouped(values, fmt, dim) * scale, fmt, dim, q.codes.shape)


def roundtrip(x: Tensor, fmt: Format, dim: int = -1, *, best: bool = False) -> Tensor:
    """What a tensor decodes to after quantisation: ``dequantise(quantise(x))`` without forming codes.

    Returns:
        The dtype of ``x`` for float32 and float64, float32 for 16-bit input.
    """
    rounded = _round(_grouped(_as_float(x), fmt, dim), fmt, best)
    out = _ungrouped(rounded.elements * rounded.scale, fmt, dim, x.shape)
    return out.double() if x.dtype == torch.float64 else out


def quantise_head(x: Tensor) -> Quantised:
    """Quantise V of ``fp8``: e4m3 with one float32 scale ``amax / 448`` for all tokens of a head.

    An e4m3 number keeps its relative precision over 15 binades, so a scale per block would bring nothing, and weights of
    all blocks can share one unit.

    Args:
        x: ``[..., T, D]``. A NaN or an infinity makes its whole head NaN.

    Returns:
        `Quantised`, scales ``[...]``.
    """
    x = _as_float(x)
    peak = x.abs().amax((-2, -1))
    scale = torch.where(peak.isfinite(), peak, torch.nan) / E4M3_MAX
    ratio = x / torch.where(scale == 0, torch.inf, scale)[..., None, None]
    codes = _round_e4m3(ratio.nan_to_num(0)).view(torch.uint8)
    return Quantised(torch.where(scale[..., None, None] > 0, codes, 0), scale)


def roundtrip_head(x: Tensor) -> Tensor:
    """What `quantise_head` decodes to; dtypes as of `roundtrip`."""
    q = quantise_head(x)
    out = q.codes.view(torch.float8_e4m3fn).float() * q.scales[..., None, None]
    return out.double() if x.dtype == torch.float64 else out


def pack_e2m1(codes: Tensor) -> Tensor:
    """Two e2m1 codes per byte along the last dimension, the even element in the low nibble.

    Raises:
        ValueError: an odd number of elements.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"packing needs an even number of elements, got {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """The inverse of `pack_e2m1`."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)


def block_means(k: Tensor) -> Tensor:
    """Mean of every KV block over its tokens, rounded to the dtype of ``k``.

    Args:
        k: ``[..., T, D]``; the last block may be incomplete and is averaged over the tokens it has.

    Returns:
        c_b ``[..., ceil(T / 64), D]``.
    """
    tokens = k.shape[-2]
    blocks = -(-tokens // BLOCK)
    work = k if k.dtype == torch.float64 else k.float()
    sums = torch.nn.functional.pad(work, (0, 0, 0, blocks * BLOCK - tokens)).unflatten(-2, (blocks, BLOCK)).sum(-2)
    counts = torch.full((blocks, 1), BLOCK, device=k.device, dtype=work.dtype)
    counts[-1] = tokens - (blocks - 1) * BLOCK
    return (sums / counts).to(k.dtype)


def mean_of_others(k: Tensor) -> Tensor:
    """Mean ``[..., D]`` of the first block of ``[..., T, D]`` without its first token, rounded like `block_means`.

    Of a sequence of one token that token.
    """
    others = k[..., min(1, k.shape[-2] - 1) : BLOCK, :]
    return (others if k.dtype == torch.float64 else others.float()).mean(-2).to(k.dtype)


def residual(x: Tensor, base: Tensor, fmt: Format, dim: int = -1, *, best: bool = False) -> Tensor:
    """What the nested plane decodes to: the rounded residual of what the base encodes.

    Args:
        x: the tensor the base encodes (dK for centred K).
        base: what the base decodes to, the shape of ``x``.
        fmt: format of the residual plane, see `thrift_attn.reference.formats.RESIDUALS`.
        dim: the contraction.
        best: see `quantise`.
    """
    return roundtrip(x.to(base.dtype) - base, fmt, dim, best=best)
