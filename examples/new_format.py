"""A format of one's own: e2m1 in groups of 8, nvfp4 with twice the scales, tried before anything of the package is changed.

    python examples/new_format.py

What lasts is a row in `reference/formats.py` and a name in `config.py` and `numerics.py` (CONTRIBUTING.md, "A format").
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from thrift_attn import ThriftConfig, attention, config, numerics
from thrift_attn.reference.formats import FORMATS, Format

NAME = "e2m1-by-8"


def add() -> None:
    """Make the format known: what it is, that a configuration may name it, and that its elements have 4 bits."""
    FORMATS[NAME] = Format(NAME, "e2m1", 8, "e4m3", (6.0, 4.0), p_factor=448.0 * 6.0)
    config._CHOICES["base_format"] = Literal["auto", "nvfp4", "mxfp4", "fp8", "drop", "e2m1-by-8"]
    numerics.FOUR_BITS = (*numerics.FOUR_BITS, NAME)


def errors(budget: float) -> dict[str, float]:
    """Relative error of attention on made data, by format."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 1024, 64, generator=draw) for heads in (4, 2, 2))
    exact = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = {}
    for name in ("mxfp4", "nvfp4", NAME):
        out = attention(q, k, v, config=ThriftConfig(base_format=name, budget=budget))
        found[name] = float((out - exact).norm() / exact.norm())
    return found


def main() -> None:
    """Print bits and errors of the formats."""
    add()
    for name, error in errors(budget=0.05).items():
        print(f"{name:10} {FORMATS[name].bits_per_element(64):.2f} bits  error {error:.3f}")


if __name__ == "__main__":
    main()
