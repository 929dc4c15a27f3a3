"""The number formats as rows of one table.

===========  =======  =====  =======  =========  =====================================================
format       element  group  scale    tops       scale of a group
===========  =======  =====  =======  =========  =====================================================
nvfp4        e2m1     16     e4m3     6, (4)     rne_e4m3(amax / top), saturating at 448
mxfp4        e2m1     32     e8m0     4, (2)     2^floor(log2 amax) / top                 (OCP MX 1.0)
fp8          e4m3     block  float32  16         amax / top
e4m3g16      e4m3     16     e4m3     6          rne_e4m3(amax / top): the ``nested8`` residual plane
===========  =======  =====  =======  =========  =====================================================

``group`` is the number of neighbours along the contraction that share a scale; ``block`` is one KV block of one head
(64 tokens x D). ``tops`` are element magnitudes that the largest value of a group may be mapped to: the first is the
format's definition, the others are tried as well under ``scales="best"``. The residual plane maps the largest residual to
6 and not to 448 because residuals are small and an e4m3 scale below 2^-9 is zero. fp8 maps it to 16, so that a sum of 128
products stays below 2^15 and fits half precision; what is lost are elements below 2^-10 of the largest one. V of fp8 is not
by block: all tokens of a head share the scale amax / 448 (`thrift_attn.reference.quantize.roundtrip_head`).

``p_factor`` is what P in [0, 1] is multiplied by before it is rounded through the format. It makes the largest weight of a row,
P = 1, exact. nvfp4: 448 * 6, the largest scale times the largest element. fp8: 448, the largest element. A scale of mxfp4 is
a power of two, so only the place of the factor between two powers of two matters: 1.5 makes 1 the element 6. It has the
least error against float64 of nine places tried (docs/method.md, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Element = Literal["e2m1", "e4m3"]
Scale = Literal["e4m3", "e8m0", "float32"]

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the e2m1 codes 0 to 7; bit 3 of a code is the sign."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Format:
    """One row of the table: element and scale encoding, group size and what a group's largest value is mapped to;
    for a base format also what P is multiplied by."""

    name: str
    element: Element
    group: int | None
    scale: Scale
    tops: tuple[float, ...]
    p_factor: float | None = None  # of a base format: P times this is rounded

    @property
    def element_bits(self) -> int:
        """Bits of one element."""
        return 4 if self.element == "e2m1" else 8

    def bits_per_element(self, head_dim: int) -> float:
        """Bits per element with its share of the scale, for ``head_dim`` in elements."""
        group = self.group or 64 * head_dim
        return self.element_bits + (32 if self.scale == "float32" else 8) / group


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("nvfp4", "e2m1", 16, "e4m3", (6.0, 4.0), p_factor=448.0 * 6.0),
        Format("mxfp4", "e2m1", 32, "e8m0", (4.0, 2.0), p_factor=1024.0 * 1.5),
        Format("fp8", "e4m3", None, "float32", (16.0,), p_factor=448.0),
        Format("e4m3g16", "e4m3", 16, "e4m3", (6.0,)),
    )
}

RESIDUALS: dict[str, Format] = {"nested": FORMATS["nvfp4"], "nested8": FORMATS["e4m3g16"]}
"""Format of the residual plane for each nested way to store the high-precision data."""
