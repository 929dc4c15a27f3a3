"""What packed pages should hold, by the plain PyTorch quantiser."""

from __future__ import annotations

from thrift_attn.reference.formats import FORMATS, RESIDUALS
from thrift_attn.reference.page_layout import Codes, encode_scales, pack_plane
from thrift_attn.reference.quantize import block_means, dequantise, quantise


def reference_planes(k, v, low="nvfp4", plane="nested", centred=True, best=False):
    """Base plane, high plane and centres of blocks [n, Hkv, 64, D] from the plain PyTorch quantiser."""
    fmt = FORMATS[low]
    centres = block_means(k)[..., 0, :]
    dk = k.float() - centres[..., None, :].float() if centred else k.float()
    v = v.float()

    def codes(x, y, fmt):
        a, b = quantise(x, fmt, -1, best=best), quantise(y, fmt, -2, best=best)
        sa, sb = encode_scales(a.scales, fmt), encode_scales(b.scales, fmt)
        if fmt.group == 32:
            sa, sb = sa.repeat_interleave(2, -1), sb.repeat_interleave(2, -2)
        return Codes(a.codes, sa, b.codes, sb), dequantise(a, fmt, -1), dequantise(b, fmt, -2)

    base, low_k, low_v = codes(dk, v, fmt)
    high = None
    if plane in RESIDUALS:
        rfmt = RESIDUALS[plane]
        high, _, _ = codes(dk - low_k, v - low_v, rfmt)
        high = pack_plane(high, rfmt.element_bits)
    return pack_plane(base, 4), high, centres
