"""The FP4 products of Blackwell, which no GPU at hand has and the interpreter does not know: worked out here in float64.

What the kernels hand to `tl.dot_scaled` (codes, scales, their order) must multiply to what the reference computes.
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from torch import Tensor

from support.prefill import check, draw
from thrift_attn.config import ThriftConfig, fraction
from thrift_attn.dispatch import interpreted
from thrift_attn.prefill import attend as kernels

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def widened(codes: Tensor, scales: Tensor, e4m3: bool) -> Tensor:
    """Elements [rows, K] of packed codes [rows, K / 2], the lower four bits first, and scales [rows, K / G]."""
    elements = torch.stack([E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]], -1).flatten(1)
    factors = scales.view(torch.float8_e4m3fn).double() if e4m3 else torch.exp2(scales.double() - 127)
    return elements * factors.repeat_interleave(elements.shape[1] // factors.shape[1], 1)


def dot_scaled(left, left_scale, left_format, right, right_scale, right_format, acc):
    """As `tl.dot_scaled` of Triton: left [M, K / 2], right [K / 2, N], scales [M, K / G] and [N, K / G], acc [M, N]."""
    assert left_format == right_format == "e2m1"

    def held(x) -> Tensor:
        return torch.from_numpy(x.handle.data).view(torch.uint8)

    a = widened(held(left), held(left_scale), left_scale.dtype.is_fp8())
    b = widened(held(right).T, held(right_scale), right_scale.dtype.is_fp8())
    product = (a @ b.T).float() + torch.from_numpy(acc.handle.data)
    return tl.core.tensor(type(acc.handle)(product.numpy(), tl.float32), acc.type)


@pytest.mark.skipif(not interpreted(), reason="on a GPU the compiler's own product is used")
@pytest.mark.parametrize(
    ("low", "dim", "queries", "keys"), [("nvfp4", 64, 65, 130), ("nvfp4", 80, 100, 65), ("mxfp4", 96, 65, 200)]
)
def test_native_products_are_the_reference(
    low: str, dim: int, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tl, "dot_scaled", dot_scaled)
    if dim == 80:  # half of the output at a time, as at head dim 256
        monkeypatch.setattr(kernels, "tuning", lambda *_: kernels.Tuning(64, 64, 4, 1, columns=64))
    torch.manual_seed(7)
    check(*draw(1, (4, 2), queries, keys, dim), ThriftConfig(base_format=low, budget=fraction(0.3)), form="native")
