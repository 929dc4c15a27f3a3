"""Rivals: what each stores and computes, against brute force and the numbers of its paper."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.tiny_eval import TEXT, loaded, save_model
from thrift_attn import ThriftConfig, attention, fraction
from thrift_attn.reference.quantize import round_e2m1
from thrift_attn.reference.scores import SCORES
from thrift_lab.eval.config_cost import stored_share
from thrift_lab.eval.cost import bytes_per_token, costs
from thrift_lab.eval.methods import described, from_description, parse_method
from thrift_lab.eval.nll import run_window, windows_of
from thrift_lab.eval.rivals import causal
from thrift_lab.eval.rivals.causal import Sides, attend_dense, attend_sides, row_chunks
from thrift_lab.eval.rivals.diagonal_band import DiagonalBand, mxfp8
from thrift_lab.eval.rivals.kivi import Kivi
from thrift_lab.eval.rivals.past_mean import PastMean
from thrift_lab.eval.rivals.peer import Peer, blocks_for, ceiling_mxfp4
from thrift_lab.eval.rivals.rival import Rival
from thrift_lab.eval.rivals.rival_table import RIVALS
from thrift_lab.eval.rivals.rounded_kv import Fp8KV, Nvfp4KV
from thrift_lab.eval.rivals.share_of_mass import ShareOfMass, fewest_blocks
from thrift_lab.eval.rivals.turboquant import TurboQuant, codebook, rotation

D, SCALE = 64, 0.125


def draw(tokens: int, *, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V of one sequence whose attention is neither flat nor a single key."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(h, tokens, D, generator=generator) for h in (heads, kv_heads, kv_heads))
    return 1.5 * q, k + 0.5 * torch.randn(kv_heads, 1, D, generator=generator), v


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_dense(q.double(), k, v, SCALE)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def off(rival: Rival, tokens: int = 300) -> float:
    """Relative error of a rival's prompt."""
    q, k, v = draw(tokens)
    return error(rival.attend(q, k, v, SCALE, tokens)[0], exact(q, k, v))


# -- what they share --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 5, 100, 300])
def test_two_equal_sides_are_exact_attention_in_any_chunks(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    q, k, v = draw(300)
    q = q[:, -queries:].double()
    want = exact(q, k, v)
    assert error(attend_dense(q.float(), k, v, SCALE), want) < 1e-6
    sides = Sides(k.double(), v.double(), k.double(), v.double())
    for most in (2**30, 2**15):
        monkeypatch.setitem(causal.AT_ONCE, "cpu", most)
        got = attend_sides(q, sides, SCALE, lambda row, column: ((row + column) % 2 == 0, (row * column) % 3 == 0))
        assert error(got, want) < 1e-12
        chunks = list(row_chunks(q, 300))
        assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(queries))
        assert all((chunk.start + 300 - queries) % 64 == 0 for chunk in chunks[1:])
    assert len(chunks) == {1: 1, 5: 1, 100: 2, 300: 5}[queries]


# -- caches that round ------------------------------------------------------------------------------------------------


def test_fp8_and_nvfp4_store_what_they_say_and_the_better_scale_is_better() -> None:
    assert off(Fp8KV()) < 0.05 < off(Nvfp4KV("best")) < off(Nvfp4KV()) < 0.2
    x = draw(200)[1] * torch.tensor([1e-4, 1e3])[:, None, None]
    for rival in (Fp8KV(), Nvfp4KV(), Nvfp4KV("best")):  # a scale for each head: neither too small nor too large
        assert [error(a, b) < 0.12 for a, b in zip(rival.rounded(x), x, strict=True)] == [True, True]
    assert error(Fp8KV("one").rounded(x)[1], x[1]) > 0.3  # numbers over 448 are cut
    assert torch.equal(Fp8KV().rounded(torch.zeros(1, 3, 16)), torch.zeros(1, 3, 16))
    assert len(Fp8KV("one").rounded(torch.linspace(-500, 500, 99999)[None, None]).unique()) <= 256
    assert bytes_per_token(Fp8KV().cost(128, 1000, None), 128)[1:] == (256, 256)
    assert bytes_per_token(Nvfp4KV().cost(128, 1000, None), 128)[1:] == (144, 144)


@pytest.mark.parametrize("dim", [-1, -2])
def test_kivi_has_as_many_levels_as_bits_and_fewer_errors_with_more(dim: int) -> None:
    x = draw(128)[1]
    errors = []
    for bits in (1, 2, 3, 4, 8):
        rounded = Kivi(bits=bits).rounded(x, dim)
        groups = rounded.movedim(dim, -1).unflatten(-1, (-1, 32)).flatten(0, -2)
        assert max(len(group.unique()) for group in groups) <= 2**bits
        errors.append(error(rounded, x))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] / errors[3] == pytest.approx(5, rel=0.1)  # a step is a third, a fifteenth of the span


def test_kivi_reads_what_a_cache_would_hold_when_the_token_is_decoded() -> None:
    q, k, v = draw(200)
    rival = Kivi(bits=2, residual=64)
    got, _ = rival.attend(q, k, v, SCALE, 200)
    for at in (0, 63, 64, 100, 128, 199):
        tokens = at + 1
        whole, old = tokens // 64 * 64, max(0, tokens - 64)
        held_k = torch.cat([rival.rounded(k[:, :whole], -2), k[:, whole:tokens]], 1)
        held_v = torch.cat([rival.rounded(v[:, :old], -1), v[:, old:tokens]], 1)
        assert error(got[:, at : at + 1], exact(q[:, at : at + 1], held_k, held_v)) < 1e-5
    assert error(got[:, :63], exact(q, k, v)[:, :63]) < 1e-6
    long = Kivi(bits=2).cost(128, 10**9, None)
    assert long.stored == pytest.approx(3 / 16)  # 2 bits, and 16 + 16 for a group of 32
    assert Kivi(bits=4).cost(128, 1024, None).read == pytest.approx(5 / 16 + 11 / 16 * 96 / 1024)
    assert Kivi(bits=2).cost(128, 64, None).stored == 1  # nothing but the newest


@pytest.mark.parametrize(("bits", "published"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_codebook_and_the_rotation_have_the_published_error(bits: int, published: float) -> None:
    """Max's table for the normal distribution (1960); TurboQuant, theorem 1, rounds them."""
    levels = torch.tensor(codebook(bits))
    assert len(levels) == 2**bits
    assert torch.allclose(levels, -levels.flip(0), atol=1e-6)
    turn = rotation(128, 0)
    assert torch.allclose(turn @ turn.mT, torch.eye(128), atol=1e-5)
    x = torch.zeros(1, 2000, 128)
    x[0, torch.arange(2000), torch.arange(2000) % 128] = (
        3.0  # one channel alone: the worst for a codebook that is not turned
    )
    x += 0.1 * torch.randn(1, 2000, 128, generator=torch.Generator().manual_seed(1))
    rival = TurboQuant(bits)
    rounded = rival.rounded(x)
    assert error(rounded, x) ** 2 == pytest.approx(published, rel=0.06)
    directions = (rounded / x.norm(dim=-1, keepdim=True)) @ turn.mT
    assert len((directions * 10**3).round().unique()) <= 2 * 2**bits
    assert rival.cost(128, 10, None).stored == (bits + 0.125) / 16


def test_the_band_and_the_first_tile_are_fp8_and_the_more_the_nearer() -> None:
    q, k, v = draw(500)
    all_fp8 = DiagonalBand(band=512, first=0).attend(q, k, v, SCALE, 500)
    assert error(all_fp8[0], exact(mxfp8(q), mxfp8(k), v)) < 1e-5
    errors = [off(DiagonalBand(band, first), 500) for band, first in ((0, 0), (128, 0), (128, 128), (512, 0))]
    assert errors == sorted(errors, reverse=True)
    stats = DiagonalBand(128, 0).attend(q, k, v, SCALE, 500)[1]
    assert stats is not None
    assert stats.promoted == 4 * sum(i % 128 + 1 for i in range(500))
    assert stats.visible == 4 * 500 * 501 // 2
    assert DiagonalBand(0, 0).cost(128, 10**6, 0.0).prefill == (0.25 + 1) / 2
    with pytest.raises(ValueError, match="band must be a multiple of 128 tokens, got 100"):
        DiagonalBand(band=100)


# -- the released kernels ---------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.floats(0.001, 0.999))
def test_the_number_of_blocks_is_the_nearest_that_is_at_least_one(blocks: int, share: float) -> None:
    def pairs(k: int) -> int:
        return sum(min(k, row) for row in range(1, blocks + 1))

    count = blocks_for(share, blocks)
    assert 1 <= count <= blocks
    wanted = share * pairs(blocks)
    assert count == 1 or pairs(count - 1) <= wanted + 1e-6
    assert count == blocks or pairs(count + 1) >= wanted - 1e-6


def test_the_ends_of_the_budget() -> None:
    assert [blocks_for(share, 32) for share in (0, 0.05, 0.5, 1)] == [0, 1, 10, 32]
    assert blocks_for(0.05, 0) == 0
    with pytest.raises(ValueError, match=r"take a share as budget, got top_k\(3\)"):
        parse_method("peer:budget=top_k(3)")


def slowly(q: Tensor, k: Tensor, v: Tensor, rival: Peer, promoted: set[int], seen: int) -> Tensor:
    """One query ``[D]`` that sees the first keys of ``[T, D]``, whole blocks, as a kernel goes through them."""
    low_q, low_k, low_v = rival.rounded(q[None])[0], rival.rounded(k), rival.rounded(v, -2)
    peak, total, out = -math.inf, 0.0, torch.zeros(D)
    for high in (False, True):
        for block in range(-(-seen // 64)):
            if (block in promoted) != high:
                continue
            keys = slice(block * 64, min(seen, block * 64 + 64))
            logits = SCALE * (k[keys] @ q if high else low_k[keys] @ low_q)
            old, peak = peak, max(peak, float(logits.max()))
            p = (logits - peak).exp()
            total, out = total * math.exp(old - peak), out * math.exp(old - peak)
            total += float(p.sum())
            out = out + (p @ v[keys] if high else (round_e2m1(6 * p) / 6) @ low_v[keys])
    return out / total


@pytest.mark.parametrize("base_format", ["nvfp4", "mxfp4"])
def test_a_prompt_against_a_loop(base_format: str) -> None:
    q, k, v = draw(256, heads=1, kv_heads=1)
    rival = Peer(base_format, fraction(0.3))
    got, stats = rival.attend(q, k, v, SCALE, 256)
    assert stats is not None
    assert (stats.visible, stats.promoted) == (10, 4)
    q_means, k_means = (x[0].unflatten(0, (4, 64)).mean(1) for x in (q, k))
    for at in (0, 70, 255):
        best = int((k_means[: at // 64 + 1] @ q_means[at // 64]).argmax())
        assert error(got[0, at], slowly(q[0, at], k[0], v[0], rival, {best}, at + 1)) < 1e-4


def test_decode_keeps_the_number_of_the_prompt_and_attends_to_the_padding() -> None:
    q, k, v = draw(300, heads=1, kv_heads=1)
    rival = Peer(budget=fraction(0.3))
    got, stats = rival.attend(q[:, -2:], k, v, SCALE, 70)  # 70 tokens are two blocks, of which 0.3 is one
    assert stats is not None
    assert stats.promoted == 2
    for row, tokens in enumerate((299, 300)):
        padded_k, padded_v = (torch.nn.functional.pad(x[0, :tokens], (0, 0, 0, 320 - tokens)) for x in (k, v))
        best = int((k[0, :256].unflatten(0, (4, 64)).mean(1) @ q[0, tokens - 1]).argmax())
        want = slowly(q[0, tokens - 1], padded_k, padded_v, rival, {best}, 320)
        assert error(got[0, row], want) < 1e-4
        hidden = slowly(q[0, tokens - 1], padded_k, padded_v, rival, {best}, tokens)
        assert error(got[0, row], hidden) > 1e-3
    grown = rival.attend(q[:, -1:], k, v, SCALE, 300)[1]
    assert grown is not None
    assert grown.promoted == blocks_for(0.3, 5) == 1


def test_scales_that_are_rounded_up_cut_nothing() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    rounded = ceiling_mxfp4(x)
    assert error(rounded, x) < 0.2
    top = x.unflatten(-1, (-1, 32)).abs().amax(-1)
    assert (
        rounded.unflatten(-1, (-1, 32)).abs().amax(-1) / top - 1
    ).abs().max() < 0.26  # half a step of e2m1 at its ends
    assert torch.equal(ceiling_mxfp4(torch.full((1, 32), 6.0)), torch.full((1, 32), 6.0))


# -- selection --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.floats(0, 1))
def test_the_fewest_blocks_that_hold_a_share(masses: list[int], share: float) -> None:
    count = int(fewest_blocks(torch.tensor([[masses]], dtype=torch.float64), share))
    heaviest = sorted(masses, reverse=True)
    assert sum(heaviest[:count]) >= share * sum(masses) * (1 - 1e-9)
    assert count == 0 or sum(heaviest[: count - 1]) < share * sum(masses)


def test_a_share_of_all_mass_is_exact_and_none_is_four_bits() -> None:
    q, k, v = draw(330)
    for score in ("mean", "fp4", "oracle"):
        outs = {}
        for mass in (0.0, 0.4, 1.0):
            outs[mass], stats = ShareOfMass(mass, score).attend(q, k, v, SCALE, 330)
            assert stats is not None
            assert (stats.share == 1) == (mass == 1)
        errors = [error(out, exact(q, k, v)) for out in outs.values()]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-6
        four_bits = attention(q[None], k[None], v[None], config=ThriftConfig(base_format="nvfp4", budget=0.0))
        assert torch.equal(outs[0.0], four_bits[0])


def test_the_score_of_4_bit_logits_is_the_true_mass_where_4_bits_hold_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(1, 2, 256, 32, generator=generator).sign()
    q, k = 1.5 * signs.flip(2).repeat(1, 1, 2, 1), torch.cat([signs, -signs], 2) + 5.0  # K less its mean is -1 and 1
    v = torch.randn(1, 2, 512, 32, generator=generator)
    options = {"budget": fraction(0.3), "force_last": 0, "base_format": "nvfp4", "sink_token": "none"}
    by_name = {
        name: attention(q, k, v, config=ThriftConfig(score=name, **options)) for name in ("fp4", "oracle", "mean")
    }
    assert torch.equal(by_name["fp4"], by_name["oracle"])
    assert not torch.equal(by_name["mean"], by_name["oracle"])
    assert SCORES["fp4"].in_decode == "sum"


# -- the mean of the past ---------------------------------------------------------------------------------------------


def test_the_first_tile_has_no_mean_and_later_ones_that_of_the_past() -> None:
    q, k, v = draw(330)
    whole, stats = PastMean(0.2).attend(q, k, v, SCALE, 330)
    assert stats is not None
    plain = ThriftConfig(base_format="nvfp4", center="block", budget=fraction(0.2))
    assert torch.equal(whole, attention(q[None], k[None], v[None], config=plain)[0])
    tiled, _ = PastMean(0.2, tile=64).attend(q, k, v, SCALE, 330)
    assert torch.equal(tiled[:, :64], whole[:, :64])
    assert not torch.equal(tiled[:, 64:], whole[:, 64:])
    later = q.clone()
    later[:, 200:] *= 3
    changed, _ = PastMean(0.2, tile=64).attend(later, k, v, SCALE, 330)
    assert torch.equal(changed[:, :192], tiled[:, :192])
    assert not torch.equal(changed[:, 256:], tiled[:, 256:])


def test_a_mean_of_the_past_helps_where_queries_have_one() -> None:
    q, k, v = draw(640)
    q = q + 4 * torch.randn(4, 1, D, generator=torch.Generator().manual_seed(1))
    errors = [error(PastMean(0.0, tile=tile).attend(q, k, v, SCALE, 640)[0], exact(q, k, v)) for tile in (64, 640)]
    assert errors[0] < 0.8 * errors[1]
    chunk, _ = PastMean(0.2, tile=64).attend(q[:, -100:], k, v, SCALE, 640)
    assert error(chunk, exact(q, k, v)[:, -100:]) < errors[1]
    with pytest.raises(ValueError, match="tile must be a positive multiple of 64, got 100"):
        PastMean(tile=100)


# -- as methods -------------------------------------------------------------------------------------------------------

SPECS = (
    "peer", "peer:budget=10%", "fp8kv", "fp8kv:scales=one", "nvfp4kv", "nvfp4kv:scales=best",
    "kivi:bits=4,group=16,residual=64", "turboquant:bits=3", "diagonal:band=256,first=0", "mass:mass=0.5",
    "mass:mass=0.9,score=fp4,compute=16bit", "past", "past:promoted=0.1,tile=64",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def test_each_is_a_method_that_records_can_name(folder: Path) -> None:
    ready = loaded(folder)
    tokens = windows_of(ready.tokenizer, TEXT, 200, 1)[0]
    plain = run_window(ready.model, parse_method("fp16"), tokens)
    before = ready.model.config._attn_implementation
    for spec in SPECS:
        method = parse_method(spec)
        assert from_description(method.name, described(method)) == method
        window = run_window(ready.model, method, tokens)
        assert 0 < float((window.nll - plain.nll).abs().mean()) < 1.5
        share = window.stats.share if window.stats is not None else None
        cost = costs(method, share, 16, 200)
        assert all(0 < value <= 1.8 for value in cost)
    assert ready.model.config._attn_implementation == before
    assert {parse_method(spec).name.partition(":")[0] for spec in SPECS} == set(RIVALS)
    for message, spec in (
        ("bits must be from 1 to 6, got 9", "turboquant:bits=9"),
        ("has no option 'budget': it takes bits, group, residual", "kivi:budget=0.1"),
        ("scales must be one of 'head', 'one', got 'max'", "fp8kv:scales=max"),
        ("mass must be from 0 to 1, got 1.5", "mass:mass=1.5"),
        ("residual must be a multiple of group", "kivi:group=32,residual=100"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_method(spec)


def test_bytes_of_this_package() -> None:
    assert stored_share(ThriftConfig.for_cache()) == pytest.approx(0.5703, abs=1e-4)
    assert stored_share(ThriftConfig.for_cache(budget=0.0)) == pytest.approx(4.5 / 16 + 1 / 128)
    assert stored_share(None) == 1
    assert bytes_per_token(costs(parse_method("fp16"), None), 128)[1:] == (512, 512)
    thrift = bytes_per_token(costs(parse_method("thrift:compute=16bit,promoted_storage=nested"), None), 128)
    assert thrift.read == pytest.approx(512 * (0.28125 * 1.05 + 1 / 128))
    assert bytes_per_token(costs(parse_method("quest"), None), 128)[1:] == (512 * (1 + 1 / 64), 512 * (0.05 + 1 / 64))
