"""Laws of the exact first token: what it is to the low path, to the budget, to masks, and to every sequence of a call."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thrift_attn import ThriftConfig, attention, attention_varlen, fraction, top_k
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.reference.attention import Mask, _Sequence, build_planes

LOW = ThriftConfig(base_format="nvfp4", budget=fraction(0))
FORMS = {
    "fp4": LOW,
    "16bit": LOW.with_(compute="16bit"),
    "mxfp4": LOW.with_(base_format="mxfp4"),
    "fp8": LOW.with_(base_format="fp8"),
    "nested": LOW.with_(promoted_storage="nested", budget=top_k(1)),
}


def sunk(queries: int, keys: int, *, heads: int = 4, dim: int = 64, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that look at the first key, whose value is far larger than the others."""
    draw = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(batch, h, n, dim, generator=draw) for h, n in ((heads, queries), (2, keys), (2, keys)))
    direction = torch.randn(dim, generator=draw)
    direction /= direction.norm()
    q += 8 * direction
    k[:, :, 0] = 12 * direction
    v[:, :, 0] *= 30
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return attention(
        q.double(), k.double(), v.double(), config=ThriftConfig(base_format="nvfp4", budget=fraction(1)), **options
    )


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"softcap": 20.0}, {"scale": 0.2}], ids=str)
def test_it_is_exact_where_it_holds_the_weight(name: str, options: dict) -> None:
    q, k, v = sunk(100, 300)
    config = FORMS[name]
    want = exact(q, k, v, **options)
    with_it, without = (
        error(attention(q, k, v, config=config.with_(sink_token=sink), **options), want) for sink in ("exact", "none")
    )
    assert with_it < 5e-3
    assert with_it < 0.1 * without


@pytest.mark.parametrize("keys", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("name", FORMS)
def test_short_sequences(name: str, keys: int) -> None:
    q, k, v = sunk(keys, keys)
    out, lse = attention(q, k, v, config=FORMS[name], return_lse=True)
    assert error(out, exact(q, k, v)) < 2e-3
    assert torch.allclose(out[:, :, 0], v[:, :, 0].repeat_interleave(2, 1), rtol=1e-6)  # which sees nothing else
    assert lse.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"causal": False}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("high", ["16bit", "nested"])
def test_promoted_it_is_no_other(high, options: dict) -> None:
    """With every block promoted, sink or not, the result is that of the promoted blocks."""
    q, k, v = sunk(130, 130)
    config = ThriftConfig(base_format="nvfp4", promoted_storage=high, budget=fraction(1))
    tolerance = 1e-6 if high == "16bit" else 1e-2
    assert error(attention(q, k, v, config=config, **options), exact(q, k, v, **options)) < tolerance


@pytest.mark.parametrize("name", FORMS)
def test_a_window_hides_it(name: str) -> None:
    """Queries that see it gain; those that do not are blind to its value, and see the rest of its block."""
    q, k, v = sunk(200, 200)
    config = FORMS[name].with_(smooth="none")  # powers of two are of a sample that has the value in it
    out = attention(q, k, v, config=config, window=50)
    v[:, :, 0] += 1000
    other = attention(q, k, v, config=config, window=50)
    assert torch.equal(out[:, :, 50:], other[:, :, 50:])
    assert ((out - other)[:, :, :50].abs().amax(-1) > 1).all()
    v[:, :, 20] += 1000
    assert not torch.equal(attention(q, k, v, config=config, window=50)[:, :, 60], other[:, :, 60])


def test_it_is_outside_of_the_budget() -> None:
    q, k, v = sunk(64, 640)
    for budget, promoted in ((fraction(0), 0), (top_k(2), 2 * 4)):
        _, stats = attention(q, k, v, config=ThriftConfig(base_format="nvfp4", budget=budget), return_stats=True)
        assert stats.promoted == promoted
        assert stats.high_mass > 0.9


@pytest.mark.parametrize("score", ["mean", "quest", "oracle"])
@pytest.mark.parametrize("queries", [3, 64])
def test_its_block_is_judged_without_it(score, queries: int) -> None:
    """The sink is worth no promoted block: only other tokens that matter are."""
    q, k, v = sunk(queries, 640)
    direction = k[0, 0, 0] / k[0, 0, 0].norm()
    k[:, :, 320:384] += 6 * direction
    config = ThriftConfig(base_format="nvfp4", budget=top_k(1), score=score, force_last=0)

    def chosen(config: ThriftConfig) -> Tensor:
        numerics = PrefillNumerics.resolve(config)
        planes = build_planes(k[0], v[0], numerics, q[0])
        return _Sequence(q[0], planes, numerics, Mask(queries, 640, True, None), 0.125, None).select()[0]

    assert chosen(config)[..., 5].all()
    assert chosen(config.with_(sink_token="none"))[..., 0].all() == (score == "oracle")
    k[:, :, 1:64] += 8 * direction
    assert chosen(config)[..., 0].all()


def test_every_sequence_has_its_own() -> None:
    q, k, v = sunk(130, 260)
    batch = [torch.cat([x, 2 * x]) for x in sunk(40, 130)]
    lengths = torch.tensor([130, 70])
    out = attention(*batch, config=LOW, kv_lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = attention(*(x[row : row + 1, :, : x.shape[2] if x is batch[0] else length] for x in batch), config=LOW)
        torch.testing.assert_close(out[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    cu = torch.tensor([0, 130, 260])
    k[:, :, 130], v[:, :, 130] = k[:, :, 0], -v[:, :, 0]
    packed = (x[0].transpose(0, 1) for x in (torch.cat([q, q], 2), k, v))
    out = attention_varlen(*packed, cu, cu, 130, 130, config=LOW)
    for start in (0, 130):
        one = attention(q, k[:, :, start : start + 130], v[:, :, start : start + 130], config=LOW)
        torch.testing.assert_close(out[start : start + 130].transpose(0, 1)[None], one, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("cut", [64, 100])
def test_chunks_see_the_same_one(cut: int) -> None:
    q, k, v = sunk(300, 300)
    config = LOW.with_(center="block")
    whole = attention(q, k, v, config=config)
    chunk = attention(q[:, :, cut:], k, v, config=config)
    torch.testing.assert_close(chunk[:, :, -cut % 64 :], whole[:, :, cut + -cut % 64 :], rtol=1e-4, atol=1e-4)


def test_queries_before_the_first_key_see_nothing() -> None:
    q, k, v = sunk(90, 70)
    out, lse = attention(q, k, v, config=LOW, return_lse=True)
    assert not out[:, :, :20].any()
    assert (lse[:, :, :20] == -math.inf).all()
    assert error(out[:, :, 20:], exact(q[:, :, 20:], k, v)) < 1e-3
