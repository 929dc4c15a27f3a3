"""Records of pages and rings: sizes, places, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from thrift_attn.vllm.page_record import PageRecord

HEADS = 3


@pytest.mark.parametrize(("dim", "token_bytes"), [(64, 150), (96, 225), (128, 300), (256, 600)])
def test_bytes_of_a_token(dim: int, token_bytes: int) -> None:
    assert PageRecord(dim).token_bytes == token_bytes
    assert PageRecord(dim).ring_tokens(128) == 75  # 64 and up to 11 drafts
    assert PageRecord(dim, None).token_bytes == token_bytes - 72 * dim // 64


def test_a_page_may_end_within_a_token() -> None:
    record = PageRecord(80)
    assert sum(record.parts) < 64 * record.token_bytes < sum(record.parts) + 64


@pytest.mark.parametrize("promoted", ["nested", "nested8", "16bit", None])
def test_parts_share_no_byte_and_fill_the_page(promoted: str | None) -> None:
    record = PageRecord(64, promoted)
    raw = torch.zeros(4, HEADS, 64, record.token_bytes, dtype=torch.uint8)
    views = record.pages(raw, torch.bfloat16)
    parts = [views.pool.base, views.pool.high, views.pool.k_block_mean, views.block0_mean, views.sink_value]
    assert all(part.shape[:2] == (4, HEADS) for part in parts)
    for page, head in ((0, 0), (3, 2)):
        for part in parts:
            part[page, head] = 1
    touched = raw.flatten(2)[:, :, : sum(record.parts)].any(-1)
    assert touched.sum() == 2
    assert touched[0, 0]
    assert touched[3, 2]
    raw.zero_()
    for number, part in enumerate(parts):
        if part.numel():
            before = (raw != 0).sum()
            part[1, 1] = 1
            found = part.element_size() * part.shape[-1]
            assert 0 < (raw != 0).sum() - before <= found, number
    assert not raw[0].any()
    assert not raw[1, 0].any()


def test_a_ring_is_a_block_of_the_same_bytes() -> None:
    record = PageRecord(64)
    raw = torch.zeros(5, HEADS, 128, record.token_bytes, dtype=torch.uint8)
    rings = record.rings(raw, torch.float16)
    assert rings.shape == (5, 2, HEADS, 75, 64)
    rings[2, 1, 0, 74] = 1
    assert raw[2, 0].any()
    assert not raw[2, 1:].any()
    assert not raw[[0, 1, 3, 4]].any()


def test_views_work_where_blocks_of_others_lie_between() -> None:
    record = PageRecord(64)
    raw = torch.zeros(4, 2, HEADS, 64, record.token_bytes, dtype=torch.uint8)
    record.pages(raw[:, 1], torch.float16).pool.base[2] = -1
    assert raw[2, 1].any()
    assert not raw[:, 0].any()


def test_what_is_no_page_is_refused() -> None:
    record = PageRecord(64)
    with pytest.raises(ValueError, match=r"expected uint8 \[blocks, Hkv, 64, 150\], got torch.uint8 \[2, 3, 64, 149\]"):
        record.pages(torch.zeros(2, HEADS, 64, 149, dtype=torch.uint8), torch.float16)
    with pytest.raises(ValueError, match="expected each head of a block in one run of bytes"):
        record.pages(torch.zeros(2, 64, HEADS, 150, dtype=torch.uint8).transpose(1, 2), torch.float16)
    with pytest.raises(ValueError, match="multiple of 16"):
        PageRecord(40)
