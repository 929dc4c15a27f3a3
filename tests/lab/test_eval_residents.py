"""Rules for the residuals of a share: the emulation is the cache, block for block, and each rule keeps what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.letters import Letters
from support.tiny_models import build
from thrift_attn import fraction
from thrift_attn.config import BLOCK, Budget, ThriftConfig, top_k
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.residents import quota_table

pytest.importorskip("transformers", minversion="5.0")
from typer.testing import CliRunner

import thrift_lab.models
from thrift_attn.transformers import ThriftCache, disable, enable
from thrift_attn.transformers.versions import cache_keyword
from thrift_lab.cli import app
from thrift_lab.eval.residents.ablation import ResidentsRecord, evaluate
from thrift_lab.eval.residents.emulation import ThroughPages, emulating
from thrift_lab.eval.residents.packed_blocks import block_error, pack
from thrift_lab.eval.residents.rules import COUNTED, Evidence, Residents, Rule
from thrift_lab.models import Loaded

CACHE = ThriftConfig.for_cache()
NUMERICS = DecodeNumerics.resolve(CACHE)
EXACT = ThriftConfig(budget=fraction(1.0), promoted_storage="16bit", center="none", smooth="none", sink_token="none")
TEXT = "".join(chr(33 + int(i)) for i in torch.randint(0, 90, (2700,), generator=torch.Generator().manual_seed(0)))


def model() -> Any:
    return build("llama", attn="sdpa", max_position_embeddings=4096)


@torch.no_grad()
def through_the_cache(tiny: Any, ids: torch.Tensor, share: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states of a text in chunks of 64 that attend exactly to pages, and the residents at its end."""
    enable(tiny)
    try:
        cache = ThriftCache(
            tiny.config, ids.shape[1], decode=CACHE.with_(residual_share=share), prefill=EXACT
        )  # fmt: skip
        options = {cache_keyword(tiny.base_model): cache, "use_cache": True}
        parts = [tiny.base_model(input_ids=part, **options).last_hidden_state[0] for part in ids.split(BLOCK, 1)]
    finally:
        disable(tiny)
    residents = []
    for layer in cache.paged_layers:
        paged = layer.paged
        pages = paged.table.pages(0)
        everywhere = torch.ones(paged.kv_heads, len(pages), dtype=torch.bool)
        slots = paged.residual_slots
        residents.append(everywhere if slots is None else (slots.of_pages(pages) >= 0).T)
    return torch.cat(parts), residents


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.15, 0.0])
def test_the_emulation_is_the_cache(share: float) -> None:
    """The cache's rule: the same blocks keep their residual in every layer and head, and the model says the same."""
    tiny, ids = model(), torch.tensor([Letters()(TEXT).input_ids[: 40 * BLOCK]])
    want, residents = through_the_cache(tiny, ids, share)
    with emulating(tiny, Rule(share=share), NUMERICS) as (kept,):
        got = tiny.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    # Sums in another order put a few numbers of the second layer on the other side of a step of 4 bits.
    assert float((got - want).abs().quantile(0.9)) < 1e-4
    assert float((got - want).abs().max()) < 0.02
    assert len(kept.residents) == len(residents) == 2
    for mine, theirs in zip(kept.residents, residents, strict=True):
        assert torch.equal(mine, theirs)
    assert kept.share == pytest.approx({1.0: 1.0, 0.15: 32 / 40, 0.0: 0.0}[share])


def test_quota_is_that_of_the_cache() -> None:
    for share in (0.0, 0.08, 0.15, 0.25, 1.0):
        table = quota_table(share, Budget.parse("max(5%, 16)"), 600).tolist()
        assert [Rule(share=share).quota(n) for n in range(601)] == table


def test_rules_are_written_as_they_are_read() -> None:
    for rule in (
        Rule(),
        Rule(share=0.08, counts="queries", among="layer"),
        Rule(seed=3, floor=16),
        Rule(planes="k", share=0.3),
    ):
        assert Rule.parse(str(rule)) == rule
    assert str(Rule()) == "share=0.15"
    assert Rule.parse("") == Rule()
    with pytest.raises(ValueError, match=r"OPTION=VALUE,\.\.\. with options share, floor"):
        Rule.parse("attention")
    for wrong in ("counts=much", "share=2", "size=1", "floor=0", "decay=1.5"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no rule: {wrong.partition('=')[0]}"):
            Rule.parse(wrong)


def follow(rule: Rule, gains: torch.Tensor, error: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The residents after each chunk; chunk i gives the blocks before it the attention ``gains[:, i, :i]``, ``[Hkv, N, N]``."""
    heads, chunks, _ = gains.shape
    residents, seen = Residents(rule, (heads, chunks), error=error), []
    for i in range(chunks):
        residents.note(gains[:, i, :i] * (rule.counts != "nothing"))
        seen.append(residents.held.clone())
    return seen


def drawn(heads: int = 2, chunks: int = 12) -> torch.Tensor:
    return torch.rand(heads, chunks, chunks, generator=torch.Generator().manual_seed(1))


BASE = {"share": 0.25, "floor": 4, "counts": "attention"}


@pytest.mark.parametrize("change", [{}, {"gather": "max"}, {"among": "layer"}, {"seed": 1}, {"counts": "nothing"}])
def test_what_every_rule_keeps_to(change: dict[str, str]) -> None:
    """The quota, the newest three blocks, and what is given up does not come back."""
    rule = Rule.model_validate({**BASE, **change})
    seen = follow(rule, drawn())
    for i, held in enumerate(seen):
        quota = rule.quota(i + 1)
        by_head = held.sum(1)
        assert int(by_head.sum()) == 2 * quota
        assert rule.among == "layer" or by_head.tolist() == [quota] * 2
        assert bool(held[:, max(0, i - 2) : i + 1].all())
        assert not bool(held[:, i + 1 :].any())
        if i:
            assert not bool((held & ~seen[i - 1])[:, :i].any())


def test_what_a_rule_looks_at() -> None:
    """One head, five blocks, room for four: which of the first two goes when the fifth comes."""

    def gone(gains: list[list[float]], error: list[float] | None = None, **change: str) -> int:
        table = torch.zeros(1, 5, 5)
        for i, row in enumerate(gains):
            table[0, i, : len(row)] = torch.tensor(row)
        weights = None if error is None else torch.tensor([[*error, 1.0, 1.0, 1.0]])
        last = follow(Rule.model_validate({**BASE, **change}), table, weights)[-1]
        return int((~last[0]).nonzero())

    steady, burst = [[], [1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [[], [0.0], [0.0, 2.5], [1.0, 0.0], [1.0, 0.0]]
    assert gone(steady) == 1  # block 0 was there one chunk longer
    assert gone(burst) == 0
    assert gone(burst, decay="0.5") == 1  # what was long ago counts less
    assert gone(burst, gather="max") == 0
    assert gone([[], [0.0], [0.0, 1.5], [1.0, 0.0], [1.0, 0.0]]) == 1
    assert gone([[], [0.0], [0.0, 1.5], [1.0, 0.0], [1.0, 0.0]], gather="max") == 0
    assert gone(steady, [0.5, 2.0]) == 0
    assert gone(steady, counts="nothing") == 0  # of equal ones the later stays
    assert {gone(steady, seed=str(seed)) for seed in range(8)} == {0, 1}


def test_heads_of_a_layer_share_by_merit() -> None:
    gains = drawn()
    gains[1] *= 100
    held = follow(Rule.model_validate({**BASE, "among": "layer"}), gains)[-1]
    assert held.sum(1).tolist() == [3, 5]  # the newest three, and all others where attention is larger


def test_what_a_chunk_tells() -> None:
    generator = torch.Generator().manual_seed(2)
    queries, scored = torch.randn(2, 3, BLOCK, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)
    mass = torch.rand(2, 3 * BLOCK, 5, generator=generator)
    seen = Evidence(queries, scored, mass, 0.5)
    logits = torch.einsum("hgqd,hnd->hgqn", queries, scored) * 0.5
    means = logits.mean(2)  # [Hkv, G, N]
    torch.testing.assert_close(COUNTED["queries"](seen), logits.softmax(-1).sum((1, 2)))
    torch.testing.assert_close(COUNTED["heads"](seen), BLOCK * means.softmax(-1).sum(1))
    torch.testing.assert_close(COUNTED["group"](seen), BLOCK * means.amax(1).softmax(-1))
    torch.testing.assert_close(COUNTED["attention"](seen), mass.sum(1))
    by_query = mass.unflatten(1, (3, BLOCK))
    torch.testing.assert_close(COUNTED["eighth"](seen), 8 * by_query[:, :, [7, 15, 23, 31, 39, 47, 55, 63]].sum((1, 2)))
    assert not COUNTED["nothing"](seen).any()


def layer(tokens: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(h, tokens, 16, generator=generator) for h in (4, 2, 2))
    return 2 * q, k, v


def test_error_of_logits_is_about_what_is_measured() -> None:
    q, k, v = layer(4 * BLOCK)
    packed, scale = pack(k, v, NUMERICS), 0.25
    queries = q.unflatten(0, (2, 2)).unflatten(2, (4, BLOCK))
    got = block_error("logits", packed, queries, scale)
    wrong = torch.einsum("hgnqd,hnkd->hgnqk", queries, packed.low[0] - packed.exact[0]) * scale
    assert got is not None
    torch.testing.assert_close(got, wrong.square().mean((1, 3, 4)), rtol=0.3, atol=0)
    for plane, name in enumerate("kv"):
        want = (packed.low[plane] - packed.exact[plane]).square().sum((2, 3))
        torch.testing.assert_close(block_error(name, packed, queries, scale), want)
    assert block_error("none", packed, queries, scale) is None


def test_what_is_refined() -> None:
    """Of K, of V, of both or of what is promoted alone; the own block is always exact."""
    q, k, v = layer(6 * BLOCK)
    whole = Rule(share=1)

    def out(rule: Rule, budget: Budget | None = None) -> torch.Tensor:
        return ThroughPages(rule, NUMERICS, budget).attend(q, k, v, 0.25, len(q))[0]

    packed = pack(k, v, NUMERICS)
    last = slice(5 * BLOCK, None)
    for rule, planes in (
        (whole, (1, 1)),
        (Rule(share=1, planes="k"), (1, 0)),
        (Rule(share=1, planes="v"), (0, 1)),
        (Rule(share=0), (0, 0)),
    ):
        keys, values = (
            torch.cat([(packed.low, packed.high)[high][plane, :, :5].flatten(1, 2), x[:, last]], 1)
            for plane, (high, x) in enumerate(zip(planes, (k, v), strict=True))
        )
        logits = q[:, last] @ keys.repeat_interleave(2, 0).mT * 0.25
        logits[..., last].masked_fill_(torch.ones(BLOCK, BLOCK).triu(1).bool(), -torch.inf)
        want = logits.softmax(-1) @ values.repeat_interleave(2, 0)
        torch.testing.assert_close(out(rule)[:, last], want)
    torch.testing.assert_close(out(whole, fraction(1.0)), out(whole))
    torch.testing.assert_close(out(whole, fraction(0.0)), out(Rule(share=0)))
    assert not torch.equal(out(whole, top_k(1)), out(whole))
    with pytest.raises(ValueError, match="a multiple of 64 tokens, got 4 queries of 5"):
        ThroughPages(whole, NUMERICS).attend(q[:, :4], k[:, :5], v[:, :5], 1.0, 5)


def test_promoted_are_the_residents_of_the_largest_score() -> None:
    queries = torch.ones(1, 2, BLOCK, 4)
    scored = torch.tensor([5.0, 1.0, 4.0, 3.0, 9.0])[None, :, None].expand(1, 5, 4)
    held = torch.tensor([[False, True, True, True, False]])
    through = ThroughPages(Rule(), NUMERICS)
    chosen = [through._promoted(queries, scored, held, 4, most, 1.0)[0].tolist() for most in (0, 2, 9)]
    assert chosen == [[False] * 5, [False, False, True, True, False], [False, True, True, True, False]]


def test_lost_error_is_what_outputs_are_off_by() -> None:
    """With one block without its residual the sum over blocks is the error itself, to first order."""
    q, k, v = layer(2 * BLOCK)
    rules = (Rule(share=1), Rule(share=0), Rule(share=1, planes="k"), Rule(share=1, planes="v"))
    through = ThroughPages(rules[0], NUMERICS, beside=rules)
    right = through.attend(q, k, v, 0.25, len(q))[0]
    assert [one.rule for one in through.followed] == [rules[0], *rules]
    size = right.square().sum((1, 2))
    for one in through.followed[1:]:
        out = ThroughPages(one.rule, NUMERICS).attend(q, k, v, 0.25, len(q))[0]
        want = float(((out - right).square().sum((1, 2)) / size).sum())
        assert one.error == pytest.approx(want, rel=0.1)
        assert one.most == through.followed[2].error > 0


def test_found_mass_is_that_of_residents() -> None:
    q, k, v = layer(6 * BLOCK)
    through = ThroughPages(Rule(share=1), NUMERICS, beside=(Rule(share=0), Rule(floor=2, newest=2, counts="nothing")))
    through.attend(q, k, v, 0.25, len(q))
    whole, none, two = through.followed
    logits = (q @ k.repeat_interleave(2, 0).mT * 0.25).masked_fill(torch.ones(384, 384).triu(1).bool(), -torch.inf)
    by_block = logits.softmax(-1).unflatten(1, (6, BLOCK)).unflatten(3, (6, BLOCK)).sum((0, 2, 4))
    before = by_block.tril(-1)
    assert (whole.mass, none.found) == (pytest.approx(float(before.sum()), rel=1e-3), 0.0)
    assert whole.found == pytest.approx(whole.mass)
    assert two.found == pytest.approx(float(before.triu(-2).sum()), rel=1e-3)
    assert [one.share for one in through.followed] == [1.0, 0.0, pytest.approx(2 / 6)]


@torch.no_grad()
def test_a_record_of_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded("tiny", model(), Letters())
    rules = tuple(map(Rule.parse, ("share=1", "floor=4", "share=0", "share=0,planes=k")))
    said: list[str] = []
    record = evaluate(loaded, TEXT, rules=rules, config=CACHE, length=8 * BLOCK, text_name="noise", log=said.append)
    whole, some, none, again = record.rows
    assert len(said) == 4
    assert record.over_first(whole) == (0.0, (0.0, 0.0))
    assert whole.kl == pytest.approx([0.0, 0.0], abs=1e-6)
    assert np.mean(none.kl) > np.mean(some.kl) > 1e-6
    assert (none.nll, none.kl, none.bytes) == (again.nll, again.kl, 0.0)
    assert (whole.bytes, some.bytes, whole.mass, none.mass) == (1.0, 0.5, 1.0, 0.0)
    assert 0 < some.mass < 1
    assert 0.0 == whole.error < some.error < none.error == 1.0
    assert [len(row.nll) for row in record.rows] == [8] * 4
    record.save(tmp_path / "x.json")
    assert ResidentsRecord.load(tmp_path / "x.json") == record
    one = evaluate(loaded, TEXT, rules=rules, config=CACHE, passes=1, length=8 * BLOCK)
    assert [len(row.nll) for row in one.rows] == [8, 0, 0, 0]
    assert [row.error for row in one.rows] == [row.error for row in record.rows]
    assert one.table().rows[2][5:] == ("-", "-", "-")
    half = evaluate(loaded, TEXT, rules=rules[:1], config=CACHE, promoted=fraction(0.5), length=8 * BLOCK)
    assert half.context["promoted"] == "0.5"
    assert half.rows[0].nll != whole.nll
    with pytest.raises(ValueError, match="at least one rule"):
        evaluate(loaded, TEXT, rules=(), config=CACHE)
    with pytest.raises(ValueError, match="a multiple of 64 from 128 on, got 100"):
        evaluate(loaded, TEXT, rules=rules, config=CACHE, length=100)

    monkeypatch.setattr(thrift_lab.models, "load_model", lambda *_, **__: loaded)
    (tmp_path / "text.txt").write_text(TEXT)
    command = [
        "eval",
        "residents",
        "--text",
        str(tmp_path / "text.txt"),
        "--length",
        "512",
        "--out",
        str(tmp_path / "y.json"),
    ]
    found = CliRunner().invoke(app, [*command, "--rule", "share=1", "--rule", "share=0,planes=k"])
    assert found.exit_code == 0, found.output
    assert "share=0.0,planes=k" in found.output
    assert [row.nll for row in ResidentsRecord.load(tmp_path / "y.json").rows] == [whole.nll, none.nll]


def test_what_lies_on_the_host_comes_back_when_it_is_wanted() -> None:
    """Block 0 has all attention, but for one chunk that looks at block 2 alone; mass does not last."""
    held = {}
    for dropped in ("lost", "host"):
        rule = Rule(share=0.01, floor=2, newest=1, decay=0.0, counts="attention", dropped=dropped)
        residents = Residents(rule, (1, 8))
        for new in range(8):
            gained = torch.zeros(1, new)
            gained[0, (0 if new != 4 else 2) : 1 if new != 4 else 3] = 1.0
            residents.note(gained)
            if new == 4:
                assert not residents.held[0, 0]
        held[dropped] = residents.held[0].nonzero()[:, 0].tolist()
        assert residents.fetched == (2 if dropped == "host" else 0)
    assert held == {"lost": [6, 7], "host": [0, 7]}


def test_an_emulation_takes_16_bit_models() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, 4 * BLOCK, 64, generator=generator).bfloat16() for heads in (4, 2, 2))
    rules = (Rule(share=0.5, floor=1, newest=1), Rule(share=0.5, floor=1, error="logits", newest=1))
    out, wide = (
        ThroughPages(rules[0], NUMERICS, beside=rules[1:]).attend(*(x.to(dtype) for x in (q, k, v)), 0.125, 0)[0]
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wide.bfloat16())
