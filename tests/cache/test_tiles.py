"""Later parts of a prompt in tiles of bounded memory are attended as the whole is, to the rounding of a merge."""

from __future__ import annotations

import math

import pytest
import torch

from support.caches import make, query, tokens
from thrift_attn.cache.tiles import attend_in_tiles
from thrift_attn.config import ThriftConfig

EPS = 2.0**-24


def whole(cache, q, k, v, scale):
    """float64 attention of new tokens over what a cache holds and themselves; output, LSE, and a bound of float32's error.

    The bound: a logit is off by at most (D + 4) roundings of the sum of its magnitudes, so each weight by twice as much
    relative to itself; a sum of n weighted values and merges add n + 8 roundings of the largest value.
    """
    outs, lses, worst = torch.zeros(q.shape).double(), torch.zeros(q.shape[:3]).double(), 0.0
    group, dim = q.shape[1] // k.shape[1], q.shape[3]
    for seq in range(cache.batch):
        held = cache.read(seq)
        keys, values = (
            torch.cat([x, new[seq]], 1).double().repeat_interleave(group, 0)
            for x, new in zip(held, (k, v), strict=True)
        )
        count = keys.shape[1]
        hidden = torch.ones(q.shape[2], count).triu(count - q.shape[2] + 1).bool()
        s = (q[seq].double() @ keys.mT * scale).masked_fill(hidden, -torch.inf)
        lses[seq], outs[seq] = s.logsumexp(-1), s.softmax(-1) @ values
        size = float((q[seq].double().abs() @ keys.abs().mT).max()) * scale
        worst = max(worst, float(values.abs().max()) * EPS * (2 * (dim + 4) * size + count + 8))
    return outs, lses, worst


@pytest.mark.parametrize("tile", [64, 128, 512])
@pytest.mark.parametrize("plane", ["nested", "16bit"])
def test_tiles_merge_to_the_whole(tile: int, plane: str) -> None:
    """The law, for sequences that end in different tiles, in a block, at its end, and for one without tokens."""
    lengths = [300, 128, 70, 0]
    cache = make(batch=4, config=ThriftConfig.for_cache(promoted_storage=plane))
    k, v = tokens(340, batch=4)
    cache.append(k[:, :, :300], v[:, :, :300], lengths=lengths)
    new_k, new_v = k[:, :, 300:], v[:, :, 300:]
    q = query(40, batch=4)
    got, lse = attend_in_tiles(cache, q, new_k, new_v, tile=tile)
    want, want_lse, bound = whole(cache, q, new_k, new_v, 1 / math.sqrt(64))
    assert bound < 1e-3
    assert (got - want).abs().max() <= bound
    assert (lse - want_lse).abs().max() <= bound
    assert [cache.tokens(seq) for seq in range(4)] == lengths


def test_no_more_than_a_tile_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    k, v = tokens(500)
    cache.append(k[:, :, :470], v[:, :, :470])
    wide, widen = [], cache.widen

    def watched(*args, **options):
        found = widen(*args, **options)
        wide.append(found[0].shape[2])
        return found

    monkeypatch.setattr(cache, "widen", watched)
    attend_in_tiles(cache, query(30), k[:, :, 470:], v[:, :, 470:], tile=128)
    assert wide == [128, 128, 128, 470 - 3 * 128]


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_a_tile_is_a_part_of_the_whole(share: float) -> None:
    cache = make(batch=2, pages=96, config=ThriftConfig.for_cache(budget=0.05, residual_share=share))
    k, v = tokens(64 * 40 + 9, batch=2)
    cache.append(k, v, lengths=[64 * 40 + 9, 130])
    every = cache.widen()
    for start, most in ((0, 128), (128, 64), (64 * 39, 128), (64 * 40, None), (64 * 41, 64)):
        for got, want in zip(cache.widen(start=start, most=most), every, strict=True):
            assert torch.equal(got, want[:, :, start : None if most is None else start + most])


def test_what_is_no_tile_is_refused() -> None:
    cache = make()
    k, v = tokens(70)
    cache.append(k, v)
    for tile in (0, 63, 100):
        with pytest.raises(ValueError, match="tile must be a multiple of 64"):
            attend_in_tiles(cache, query(70), k, v, tile=tile)
    with pytest.raises(ValueError, match=r"k must have shape \[1, 2, T, 64\]"):
        attend_in_tiles(cache, query(70), k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="start and end at multiples of 64"):
        cache.widen(start=32)
