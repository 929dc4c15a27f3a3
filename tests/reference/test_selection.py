"""Budgets and selection against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thrift_attn import Budget, ThriftConfig, attention, attention_varlen, floored, fraction, paper, top_k
from thrift_attn.cache import PagedThriftCache
from thrift_attn.reference.budget import (
    asked_in_decode,
    asked_share,
    blocks_in_decode,
    blocks_per_row,
    decode_budget,
    list_capacity,
    promote,
    promoted_in_decode,
)
from thrift_attn.reference.scores import block_extremes, mean_score, quest_score

FLOORED = st.builds(floored, st.floats(0, 1), st.integers(1, 40))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1))
def test_a_fraction_promotes_that_share_of_the_causal_pairs(rows, share):
    visible = torch.arange(1, rows + 1)
    counts = blocks_per_row(fraction(share), visible, rows)
    assert (counts >= 0).all()
    assert (counts <= visible).all()
    assert abs(int(counts.sum()) - share * int(visible.sum())) <= 0.5 + 1e-6
    # One number of blocks for every row that sees so many, up to rounding.
    full = counts[visible > counts.max()]
    assert len(full) == 0 or int(full.max() - full.min()) <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.floats(0, 1))
def test_a_fraction_of_any_visible_counts(visible, share):
    counts = blocks_per_row(fraction(share), torch.tensor(visible), 40)
    assert abs(int(counts.sum()) - share * sum(visible)) <= 0.5 + 1e-6


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=5, max_size=5), min_size=1, max_size=6),
    st.one_of(st.floats(0, 1).map(fraction), st.integers(0, 50).map(top_k), st.just(paper()), FLOORED),
)
def test_sequences_of_a_batch_get_what_they_get_alone(visible, budget):
    """One rule: rows of many sequences at once, one sequence, one row (decode), and the room of a list agree."""
    seen = torch.tensor(visible)
    blocks = seen.amax(1)
    batch = blocks_per_row(budget, seen, blocks)
    for row, own, n in zip(seen, batch, blocks, strict=True):
        assert torch.equal(blocks_per_row(budget, row, int(n)), own)
        assert int(own.max()) <= list_capacity(budget, int(n))
    table = decode_budget(budget, 40)
    for n in range(1, 41):
        assert int(table[n]) == int(blocks_per_row(budget, torch.tensor([n]), n)) <= list_capacity(budget, n)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=80), FLOORED)
def test_a_floor_is_the_fraction_or_the_floor_whichever_is_more(seen, budget):
    visible = torch.tensor(seen)
    counts, shared = (blocks_per_row(b, visible, max(seen)) for b in (budget, fraction(budget.value)))
    assert torch.equal(counts, torch.maximum(shared, visible.clamp(max=budget.blocks)))
    if visible.any():
        asked = asked_share(budget, visible, max(seen)) * sum(seen)
        # The fraction rounds within half a block in all; a row at its floor may hide one that was rounded down.
        assert -0.5 - 1e-6 <= int(counts.sum()) - asked <= 0.5 + len(seen)


@pytest.mark.parametrize(
    "budget", [floored(0.05, blocks=16), floored(0.02, blocks=8), floored(0.05, blocks=32)], ids=str
)
def test_the_default_falls_smoothly_from_all_to_its_share(budget):
    """Of a causal prompt: all blocks up to the floor, then a share that never rises, then the fraction exactly."""
    floor, before = budget.blocks, 1.0
    for n in range(1, 1500):
        visible = torch.arange(1, n + 1)
        share = float(blocks_per_row(budget, visible, n).sum()) / int(visible.sum())
        assert share <= before + 1 / max(1, int(visible[:-1].sum()))  # rounding: half a block of each total
        assert n > floor or share == 1
        # One block more in a prompt of many is a small change: no cliff.
        assert before - share < 1 / max(floor, n - 1)
        before = share
    assert before == pytest.approx(budget.value, abs=1e-3)


def test_the_default_in_decode_never_loses_a_block_when_the_cache_grows():
    table = decode_budget(floored(0.05, blocks=16), 4000)
    assert table[:17].tolist() == list(range(17))
    assert (table.diff() >= 0).all()
    assert (table.diff() <= 1).all()
    assert torch.equal(table[330:], decode_budget(fraction(0.05), 4000)[330:])
    assert promoted_in_decode(floored(0.05, blocks=16), 1024) == 16
    assert promoted_in_decode(floored(0.05, blocks=16), 8192) == 16
    assert promoted_in_decode(floored(0.05, blocks=16), 131072) == 102


@pytest.mark.parametrize("tokens", [1, 63, 1000, 1024])
def test_up_to_1024_tokens_are_exact_whole_in_chunks_packed_and_in_a_cache(tokens):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, 32) for heads in (4, 2, 2))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out, stats = attention(q, k, v, return_stats=True)
    assert stats.promoted == stats.visible == stats.asked
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)
    half = tokens // 2
    torch.testing.assert_close(attention(q[:, :, half:], k, v), want[:, :, half:], rtol=0, atol=2e-6)
    cu = torch.tensor([0, tokens])
    packed = attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), cu, cu, tokens, tokens)
    torch.testing.assert_close(packed.transpose(0, 1)[None], want, rtol=0, atol=2e-6)
    cache = PagedThriftCache(
        batch=1, kv_heads=2, head_dim=32, num_pages=20, config=ThriftConfig.for_cache(promoted_storage="16bit"),
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    cache.append(k, v)
    torch.testing.assert_close(cache.attend(q[:, :, -1:]), want[:, :, -1:], rtol=0, atol=2e-6)


def test_a_longer_sequence_is_not_exact_and_has_its_floor():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 2048, 32) for _ in "qkv")
    out, stats = attention(q, k, v, return_stats=True)
    visible = torch.arange(1, 33)
    assert stats.promoted == 2 * int(visible.clamp(max=16).sum())
    assert stats.visible == 2 * int(visible.sum())
    assert not torch.allclose(out, attention(q, k, v, config=ThriftConfig(budget=fraction(1))), atol=1e-4)


def test_the_ends_of_the_range():
    visible = torch.arange(1, 17)
    assert not blocks_per_row(fraction(0), visible, 16).any()
    assert torch.equal(blocks_per_row(fraction(1), visible, 16), visible)
    assert blocks_per_row(top_k(3), visible, 16).tolist() == [1, 2] + [3] * 14
    assert blocks_per_row(top_k(0), visible, 16).sum() == 0


@pytest.mark.parametrize(("blocks", "want"), [(1, 1), (63, 1), (64, 1), (127, 1), (128, 2), (2048, 32)])
def test_the_papers_rule(blocks, want):
    assert blocks_per_row(paper(), torch.tensor([blocks]), blocks).tolist() == [want]


@pytest.mark.parametrize(
    "budget", [fraction(0), fraction(0.05), fraction(1), floored(0.05, 16), top_k(3), paper()], ids=str
)
def test_the_decode_table_is_the_budget_of_one_row(budget):
    table = decode_budget(budget, 400)
    assert table.tolist() == [0] + [int(blocks_per_row(budget, torch.tensor([n]), n)) for n in range(1, 401)]


@pytest.mark.parametrize(
    "budget", [fraction(0), fraction(0.05), fraction(1), floored(0.05, 16), top_k(3), paper()], ids=str
)
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 773, 832, 2565, 64 * 200 + 1])
def test_decode_counts_complete_blocks_alone(budget, tokens):
    full = tokens // 64
    want = int(blocks_per_row(budget, torch.tensor([full]), full)) if full else 0
    assert promoted_in_decode(budget, tokens) == want
    assert promoted_in_decode(fraction(0.05), 773) == 1  # 12 complete blocks
    assert asked_in_decode(fraction(0.05), 773) == pytest.approx(0.6)
    assert asked_in_decode(floored(0.05, blocks=8), 773) == 8


@pytest.mark.parametrize(
    ("tokens", "new", "window", "blocks"),
    [
        (522, 1, 200, (5, 8)),
        (522, 1, 11, (7, 8)),
        (522, 1, 10, (8, 8)),
        (522, 16, 10, (7, 8)),
        (30, 16, 8, (0, 0)),
        (512, 1, 65, (6, 8)),
    ],
)
def test_decode_sees_what_the_first_new_token_sees(tokens, new, window, blocks):
    assert blocks_in_decode(tokens, new_tokens=new, window=window) == range(*blocks)
    assert promoted_in_decode(fraction(1), tokens, new_tokens=new, window=window) == blocks[1] - blocks[0]


def test_asked_share():
    visible = torch.arange(1, 5)
    assert asked_share(fraction(0.3), visible, 4) == 0.3
    assert asked_share(top_k(1), visible, 4) == pytest.approx(0.4)


def test_promote_takes_forced_blocks_then_the_best():
    scores = torch.tensor([[[0.0, 5.0, 1.0, 4.0, 3.0, 9.0]]])
    visible = torch.tensor([[True, True, True, True, True, False]])

    def chosen(k, **forced):
        return promote(scores, visible, torch.tensor([k]), **forced)[0, 0].nonzero().flatten().tolist()

    assert chosen(2) == [1, 3]
    assert chosen(1, first=1, last=1) == [0]  # the sink comes before the diagonal
    assert chosen(2, first=1, last=1) == [0, 4]
    assert chosen(3, first=1, last=1) == [0, 1, 4]
    assert chosen(5) == [0, 1, 2, 3, 4]
    assert chosen(0, first=1, last=1) == []


def test_ties_go_to_the_lower_index():
    visible = torch.ones(1, 100, dtype=torch.bool)
    chosen = promote(torch.zeros(2, 1, 100), visible, torch.tensor([7]))
    assert chosen.nonzero()[:, 2].tolist() == list(range(7)) * 2


def test_mean_score_is_the_logit_of_the_means_per_kv_head():
    queries, centres = torch.randn(6, 5, 16), torch.randn(2, 9, 16)
    got = mean_score(queries, centres, 0.3)
    want = torch.einsum("hrd,hnd->hrn", queries, centres.repeat_interleave(3, 0)) * 0.3
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tokens", [1, 64, 65, 200])
def test_quest_bounds_every_logit_of_the_block(tokens):
    k, queries = torch.randn(2, tokens, 16), torch.randn(4, 3, 16)
    bound = quest_score(queries, *block_extremes(k), 1.0)
    logits = torch.einsum("hrd,htd->hrt", queries, k.repeat_interleave(2, 0))
    for t in range(tokens):
        assert (logits[..., t] <= bound[..., t // 64] + 1e-5).all()


@pytest.mark.parametrize("text", ["0.05", "5%", "max(5%, 16)", "max(0.05,3)", "top_k(8)", "paper"])
def test_budgets_are_read_from_text_and_back(text):
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["", "nan", "-0.1", "1.5", "120%", "top_k(-1)", "top_k(x)", "lots", "top_k(1.5)", "inf"]
)
def test_bad_budget_text(text):
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)
