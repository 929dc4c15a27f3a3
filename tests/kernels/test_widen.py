"""Pages back to 16 bits: the kernel writes what the pages decode to in plain PyTorch, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from test_cache_kernels import make, tokens

from thrift_attn.cache.paged import DECODE
from thrift_attn.cache.widen import widen_pages


def filled(lengths, **options):
    """A cache that reads with the kernels and one that reads in PyTorch, over the same pages, written in PyTorch."""
    plain = make("reference", batch=len(lengths), heads=1, **options)
    plain.append(*tokens(max(lengths), batch=len(lengths), heads=1, dim=plain.head_dim), lengths=lengths)
    kernels = copy.copy(plain)
    kernels.backend = "triton"
    return kernels, plain


CASES = [
    (DECODE, 64, 1),
    (DECODE.with_(high="nested8", center="none"), 80, 63),
    (DECODE.with_(high="16bit"), 64, 64),
    (DECODE.with_(low="mxfp4"), 96, 65),
]


@pytest.mark.parametrize(("config", "dim", "length"), CASES)
def test_kernel_equals_pytorch(config, dim, length):
    lengths = [length, 66]
    kernels, plain = filled(lengths, config=config, dim=dim)
    for got, want in zip(kernels.widen(room=3), plain.widen(room=3), strict=True):
        assert got.shape == (2, 1, 69, dim)
        assert torch.equal(got, want)
        assert not got[0, :, length:].any()


def test_poisoned_pages_of_others_are_not_read():
    kernels, plain = filled([65, 66])
    want = [x[1, :, :66].clone() for x in plain.widen()]
    for page in kernels.table.pages(0).tolist():
        kernels.pool.base[page] = kernels.pool.high[page] = -1
        kernels.pool.centres[page] = torch.nan
    kernels.tail[:, 0] = torch.nan
    for got, expected in zip(kernels.widen(), want, strict=True):
        assert torch.equal(got[1, :, :66], expected)


def test_too_little_room_is_an_error():
    kernels, _ = filled([70])
    out = torch.zeros(1, 1, 69, 64, dtype=torch.float16, device=kernels.device)
    with pytest.raises(ValueError, match="room for 70"):
        widen_pages(
            out, out, *kernels.pool, kernels.tail, kernels.table.table, kernels.lengths,
            tokens=70, plane="nested", centred=True,
        )  # fmt: skip
