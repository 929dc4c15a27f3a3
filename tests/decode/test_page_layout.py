"""The page layout: every word, every scale and the round trips."""

from __future__ import annotations

import pytest
import torch

from thrift_attn.reference.formats import FORMATS
from thrift_attn.reference.page_layout import (
    Codes,
    decode_bytes,
    encode_scales,
    pack_copy,
    pack_plane,
    pack_word,
    plane_size,
    unpack_copy,
    unpack_plane,
    unpack_word,
)
from thrift_attn.reference.quantize import decode_scales


def test_every_word_is_used_once() -> None:
    words = torch.arange(65536)
    assert torch.equal(pack_word(unpack_word(words)), words.int())


def test_every_e4m3_scale_survives() -> None:
    scales = torch.arange(127, dtype=torch.uint8)
    fmt = FORMATS["nvfp4"]
    assert torch.equal(decode_bytes(encode_scales(scales, fmt)), decode_scales(scales, fmt))
    assert decode_bytes(encode_scales(torch.tensor([127], dtype=torch.uint8), fmt)).isnan()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
def test_plane_round_trip(dim: int, bits: int) -> None:
    top = 16 if bits == 4 else 256
    shapes = ((64, dim), (64, dim // 16), (64, dim), (4, dim))
    data = Codes(
        *(torch.randint(0, top if i % 2 == 0 else 256, (3, 2, *s)).to(torch.uint8) for i, s in enumerate(shapes))
    )
    plane = pack_plane(data, bits)
    assert plane.shape == (3, 2, plane_size(dim, bits).words)
    for name, there, back in zip(Codes._fields, data, unpack_plane(plane, dim, bits), strict=True):
        assert torch.equal(there, back), name


@pytest.mark.parametrize("dim", [16, 80, 128])
def test_copy_round_trip(dim: int) -> None:
    k, v = torch.randn(2, 3, 64, dim).half().unbind(0)
    back_k, back_v = unpack_copy(pack_copy(k, v), dim)
    assert torch.equal(k, back_k)
    assert torch.equal(v, back_v)


def test_one_page_has_the_documented_place_of_one_element() -> None:
    data = Codes(*(torch.zeros(s, dtype=torch.uint8) for s in ((64, 128), (64, 8), (64, 128), (4, 128))))
    data.k[16 * 2 + 11, 16 * 3 + 6] = 0b1111  # quarter 2, row 11 = 8 + 3, column 6 = 4 * 1 + 2 of tile 3
    words = pack_plane(data, 4).view(torch.int16)
    place = ((3 * 4 + 1) * 2 + 1) * 4 + 2
    assert words.nonzero().tolist() == [[3 * 256 + place]]
