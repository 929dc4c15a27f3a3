"""Rows over pages and rings, as an engine holds them, against the cache of the library."""

from __future__ import annotations

import random

import pytest
import torch

from thrift_attn import ThriftConfig
from thrift_attn.cache import PagedThriftCache
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.paged_rows import SharedPages, append_row, attend_row
from thrift_attn.vllm.page_record import PageRecord

HEADS, DIM = 2, 64
CONFIG = ThriftConfig.for_cache(budget=0.3, base_format="nvfp4")
NUMERICS = DecodeNumerics.resolve(CONFIG)
SCALE = DIM**-0.5


def pages_of(cache: PagedThriftCache | None = None, fill: int = 0) -> SharedPages:
    """Records with room for some sequences; scales are those that the cache took from its first block."""
    record = PageRecord(DIM)
    raw = torch.full((24, HEADS, 64, record.token_bytes), fill, dtype=torch.uint8)
    rings = torch.full((4, HEADS, 128, record.token_bytes), fill, dtype=torch.uint8)
    scales = torch.ones(HEADS, DIM), torch.ones(HEADS)
    if cache is not None:
        scales = cache.per_sequence.k_channel_scale[0], cache.per_sequence.v_head_scale[0]
    return SharedPages(*record.pages(raw, torch.float16), record.rings(rings, torch.float16), *scales)


def draw(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V of a sequence, and as many queries."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(HEADS, tokens, DIM, generator=g).half() for _ in range(2))
    return k + torch.randn(HEADS, 1, DIM, generator=g).half(), v, torch.randn(4, tokens, DIM, generator=g).half()


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("fill", [0, 0x7F])
def test_a_row_is_what_the_cache_is(tokens: int, fill: int) -> None:
    """With 0x7F what was never written is NaN."""
    k, v, q = draw(tokens)
    cache = PagedThriftCache(
        batch=1, kv_heads=HEADS, head_dim=DIM, num_pages=8, config=CONFIG, dtype=torch.float16, device="cpu"
    )
    cache.append(k[None], v[None])
    want, want_lse = cache.attend(q[None, :, -1:], return_lse=True)
    to, pages = pages_of(cache, fill), torch.tensor([7, 3, 20, 5, 11, 2])
    append_row(to, pages, 1, k, v, before=0, numerics=NUMERICS)
    out, lse = attend_row(q[:, -1:], to, pages, 1, tokens=tokens, numerics=NUMERICS, scale=SCALE)
    assert torch.equal(out.half(), want[0])
    assert torch.equal(lse, want_lse[0])


@pytest.mark.parametrize("seed", range(6))
def test_pieces_and_tokens_that_are_taken_back_leave_nothing(seed: int) -> None:
    """Drafts that are taken back may have filled a block: it is packed again."""
    rng, total = random.Random(seed), 270
    k, v, q = draw(total, seed)
    wrong_k, wrong_v, _ = draw(total, seed + 100)
    pages = torch.tensor([7, 3, 20, 5, 11])
    whole, pieces = pages_of(), pages_of()
    append_row(whole, pages, 2, k, v, before=0, numerics=NUMERICS)
    at = 0
    while at < total:
        count = min(total - at, rng.choice([1, 2, 5, 12, 64, 100]))
        drafts = min(total - at - count, rng.randint(0, 11)) if count < 60 else 0
        new_k, new_v = (
            torch.cat([good[:, at : at + count], bad[:, :drafts]], 1) for good, bad in ((k, wrong_k), (v, wrong_v))
        )
        append_row(pieces, pages, 2, new_k, new_v, before=at, numerics=NUMERICS)
        at += count
    found = [
        attend_row(q[:, -3:], of, pages, 2, tokens=total, numerics=NUMERICS, scale=SCALE) for of in (whole, pieces)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for one, other in zip(whole.pool, pieces.pool, strict=True):
        assert torch.equal(one[pages[:4]], other[pages[:4]])


def test_sequences_share_pages_and_keep_their_own_newest_tokens() -> None:
    k, v, q = draw(200)
    other_k, other_v, _ = draw(200, 1)
    to, first, second = pages_of(), torch.tensor([4, 9, 1, 0]), torch.tensor([4, 9, 6, 0])
    append_row(to, first, 0, k, v, before=0, numerics=NUMERICS)
    append_row(to, second, 1, other_k[:, 128:], other_v[:, 128:], before=128, numerics=NUMERICS)
    alone = pages_of()
    mixed = torch.cat([k[:, :128], other_k[:, 128:]], 1), torch.cat([v[:, :128], other_v[:, 128:]], 1)
    append_row(alone, second, 1, *mixed, before=0, numerics=NUMERICS)
    for ring, pages, of in ((0, first, pages_of()), (1, second, alone)):
        if ring == 0:
            append_row(of, pages, ring, k, v, before=0, numerics=NUMERICS)
        got, want = (
            attend_row(q[:, -1:], held, pages, ring, tokens=200, numerics=NUMERICS, scale=SCALE)[0] for held in (to, of)
        )
        assert torch.equal(got, want)
