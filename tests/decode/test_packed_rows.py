"""Rows as an engine has them: packed, some sequences without any, a first token's extras in its page, one set of scales."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from support.device import DEVICE
from support.engine_layout import in_records, in_rings
from support.kernel_caches import make, query, tokens
from support.paged import keep_some, make_cache
from support.steps import cache_tensors, numerics_of, poisoned_step
from thrift_attn import top_k
from thrift_attn.config import ThriftConfig
from thrift_attn.decode import ops
from thrift_attn.decode.pack import pack_blocks
from thrift_attn.decode.tensors import CacheTensors
from thrift_attn.numerics import DecodeNumerics


def engine(cache: CacheTensors) -> CacheTensors:
    """A copy with records, rings of 73 tokens and the scales of the first sequence for all."""
    records, _ = in_records(in_rings(cache, 73), first=True)
    assert records.k_channel_scale is not None
    assert records.v_head_scale is not None
    scales = {"k_channel_scale": records.k_channel_scale[0].clone(), "v_head_scale": records.v_head_scale[0].clone()}
    return dataclasses.replace(records, **scales)


def padded(cache: CacheTensors, rows: int) -> CacheTensors:
    """The same with more sequences, which have no tokens, pages or rings."""

    def more(x: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.cat([x, x.new_full((rows, *x.shape[1:]), fill)])

    own = {"page_table": more(cache.page_table, -1), "lengths": more(cache.lengths, 0), "rings": more(cache.rings, 0)}
    return dataclasses.replace(cache, **own)


def packed(*parts: torch.Tensor, behind: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``[H, T, D]`` of each sequence one after the other, some of nobody behind them, and where each begins."""
    rows = torch.cat([x.transpose(0, 1) for x in parts])
    nobody = rows.new_full((behind, *rows.shape[1:]), torch.nan)
    ends = torch.tensor([0, *(x.shape[1] for x in parts)]).cumsum(0)
    return torch.cat([rows, nobody]).contiguous(), ends.int().to(DEVICE)


def filled(plane: str):
    """A cache of two sequences of 126 and 62 tokens with pages for more, whose first blocks bring the same scales."""
    config = ThriftConfig.for_cache(promoted_storage=plane, budget=top_k(1))
    cache = make("triton", batch=2, heads=1, pages=8, config=config)
    k, v = tokens(140, batch=2, heads=1)
    k[1, :, :64], v[1, :, :64] = k[0, :, :64], v[0, :, :64]
    cache.append(k[:, :, :126], v[:, :, :126], lengths=[126, 62])
    cache.reserve(10)
    return cache, k, v


def attend(q: torch.Tensor, cache: CacheTensors, numerics: DecodeNumerics, **options: Any):
    """A step in so many splits, however many sequences there are; what is not written is poison."""
    step = poisoned_step(q, cache, numerics, splits=3, scale=0.125, **options)
    for launch in ops.step_kernels(step).values():
        launch()
    return step.out, step.lse


@pytest.mark.parametrize("plane", ["nested", "16bit"])
def test_an_engine_and_a_cache_hold_and_answer_the_same_bits(plane: str) -> None:
    """Ragged steps, one of which completes the first block of a sequence, whose extras its page gets."""
    cache, k, v = filled(plane)
    plain = cache.tensors()
    other = padded(engine(plain), 1)
    q = query(3, batch=2, heads=2)
    for counts in ((3, 1), (0, 3)):
        at = [slice(tokens, tokens + n) for tokens, n in zip(plain.lengths.tolist(), counts, strict=True)]
        new = [[x[seq, :, part] for seq, part in enumerate(at)] for x in (k, v)]
        rows, starts = packed(*new[0], new[0][0][:, :0], behind=2)
        values, _ = packed(*new[1], new[1][0][:, :0], behind=2)
        ops.append(rows, values, other, cache.numerics, starts=starts, most=3)
        dense = [torch.stack([torch.nn.functional.pad(x, (0, 0, 0, 3 - x.shape[1])) for x in each]) for each in new]
        ops.append(
            dense[0], dense[1], plain, cache.numerics, counts=torch.tensor(counts, dtype=torch.int32, device=DEVICE)
        )
        assert other.lengths.tolist() == [*plain.lengths.tolist(), 0]
    pages = plain.page_table[1, :1].long()
    assert torch.equal(other.sink_value[pages], plain.sink_value[1:])
    assert torch.equal(other.block0_mean[pages], plain.block0_mean[1:])
    for name in ("base", "high", "k_block_mean"):
        assert torch.equal(getattr(other, name), getattr(plain, name))
    want, want_lse = attend(q, plain, cache.numerics)
    rows, starts = packed(q[0], q[1], q[0][:, :0], behind=2)
    got, got_lse = attend(rows, other, cache.numerics, starts=starts, most=3)
    assert torch.equal(got[:6], want.transpose(1, 2).flatten(0, 1))
    assert torch.equal(got_lse[:6], want_lse.transpose(1, 2).flatten(0, 1))
    assert got[6:].isnan().all()  # nothing is written
    assert got_lse[6:].isnan().all()
    assert not torch.equal(other.block0_mean[pages], other.k_block_mean[pages])


@pytest.mark.parametrize("options", [{}, {"window": 100}], ids=str)
def test_a_row_without_tokens_changes_nothing_of_the_others(options: dict[str, Any]) -> None:
    """The law: with sequences without queries between and behind, every bit of the others is what it is without them."""
    cache, _, _ = filled("nested")
    tensors = engine(cache.tensors())
    q = query(3, batch=2, heads=2)
    alone, starts = packed(q[0], q[1][:, :1])
    want = attend(alone, tensors, cache.numerics, starts=starts, most=3, **options)
    order = torch.tensor([2, 0, 3, 1, 4], device=DEVICE)
    wider = padded(tensors, 3)
    own = {name: getattr(wider, name)[order].contiguous() for name in ("page_table", "lengths", "rings")}
    own["lengths"][2] = 126  # a sequence that holds tokens and asks nothing, over pages that are not there
    rows, starts = packed(q[0][:, :0], q[0], q[0][:, :0], q[1][:, :1], q[0][:, :0], behind=1)
    got = attend(rows, dataclasses.replace(wider, **own), cache.numerics, starts=starts, most=3, **options)
    for x, y in zip(got, want, strict=True):
        assert not y.isnan().any()
        assert torch.equal(x[:4], y)
    # As many queries as each has, alone in a call of another form.
    dense = attend(q[1:, :, :1], _only(tensors, 1), cache.numerics, **options)
    torch.testing.assert_close(got[0][3], dense[0][0, :, 0], rtol=0, atol=2e-3)
    torch.testing.assert_close(got[1][3], dense[1][0, :, 0], rtol=0, atol=3e-3)


def test_the_past_mass_of_a_sequence_without_queries_stays() -> None:
    held = keep_some(make_cache([64 * 3 + 9, 70], 1, 64), 0.5)
    assert held.residents is not None
    held.residents.past_mass.fill_(1)
    tensors = cache_tensors(
        held.centres, held.page_table, held.lengths, base=held.base, high=held.high, tail=held.tail, rings=held.rings,
        residents=held.residents,
    )  # fmt: skip
    rows, starts = packed(query(1, heads=2)[0], query(1, heads=2)[0][:, :0])
    out, _ = attend(rows, tensors, numerics_of(sink_token="none"), starts=starts, most=1)
    mass = [held.residents.past_mass[held.page_table[seq, :blocks].long()] for seq, blocks in ((0, 3), (1, 1))]
    assert not out.isnan().any()
    assert (mass[0] != 1).all()
    assert (mass[1] == 1).all()


def test_a_part_of_a_prompt_is_packed_at_once() -> None:
    """Its first block among others, where scales are fixed: the pages are those of steps."""
    cache, k, v = filled("nested")
    steps, bulk = engine(cache.tensors()), engine(cache.tensors())
    pages = cache.table.table[0, :2]
    for tensors in (steps, bulk):
        tensors.base[pages.long()] = 0
        tensors.sink_value[pages.long()] = 0
    for number in range(2):
        blocks = [x[:1, :, 64 * number : 64 * number + 64] for x in (k, v)]
        at = torch.tensor([number], dtype=torch.int32, device=DEVICE)
        pack_blocks(
            blocks[0], blocks[1], pages[at.long()], cache=steps, numerics=cache.numerics, seqs=at - at, numbers=at
        )
    blocks = [x[0, :, :128].unflatten(1, (2, 64)).transpose(0, 1) for x in (k, v)]
    numbers = torch.arange(2, dtype=torch.int32, device=DEVICE)
    pack_blocks(
        blocks[0],
        blocks[1],
        pages,
        cache=bulk,
        numerics=cache.numerics,
        seqs=torch.zeros_like(numbers),
        numbers=numbers,
    )
    for name in ("base", "high", "k_block_mean"):
        assert torch.equal(getattr(bulk, name), getattr(steps, name))
    assert torch.equal(bulk.sink_value[pages[:1].long()], v[:1, :, 0])
    assert bulk.base[pages.long()].any()


def _only(cache: CacheTensors, seq: int) -> CacheTensors:
    own = {name: getattr(cache, name)[seq : seq + 1] for name in ("page_table", "lengths", "rings")}
    return dataclasses.replace(cache, **own)


def test_a_step_writes_where_it_is_told_and_nowhere_else() -> None:
    cache, _, _ = filled("nested")
    tensors = engine(cache.tensors())
    rows, starts = packed(query(1, heads=2)[0], query(1, heads=2)[0], behind=1)
    out = torch.full_like(rows, 7)
    step = ops.begin_step(rows, tensors, cache.numerics, scale=0.125, starts=starts, most=1, out=out)
    for launch in ops.step_kernels(step).values():
        launch()
    assert step.out.data_ptr() == out.data_ptr()
    assert (out[2:] == 7).all()
    assert not (out[:2] == 7).any()
    got, lse = ops.attend(rows, tensors, cache.numerics, scale=0.125, starts=starts)
    assert torch.equal(got[:2], out[:2])
    assert not got[2:].any()
    assert (lse[2:] == -torch.inf).all()


def test_a_sequence_with_more_rows_than_was_said_is_left_out() -> None:
    """Only the device knows its rows: nothing is appended, the flag is set, and its answers say that there are none."""
    cache, k, _ = filled("nested")
    tensors = engine(cache.tensors())
    q = query(3, batch=2, heads=2)
    alone, starts = packed(q[0][:, :0], q[1][:, :1])
    want, want_lse = ops.attend(alone, tensors, cache.numerics, scale=0.125, starts=starts, most=1)
    rows, starts = packed(q[0], q[1][:, :1])
    got, got_lse = ops.attend(rows, tensors, cache.numerics, scale=0.125, starts=starts, most=1)
    assert not got[:3].any()
    assert (got_lse[:3] == -torch.inf).all()
    assert torch.equal(got[3:], want)
    assert torch.equal(got_lse[3:], want_lse)
    before, lengths = tensors.tail.clone(), tensors.lengths.tolist()
    new, starts = packed(k[0, :, 126:129], k[1, :, 62:63])
    ops.append(new, new, tensors, cache.numerics, starts=starts, most=1)
    assert tensors.overrun.tolist() == [1]
    assert tensors.lengths.tolist() == [lengths[0], lengths[1] + 1]
    own, other = (tensors.rings.tolist()[seq] for seq in (0, 1))
    assert torch.equal(tensors.tail[own], before[own])
    assert not torch.equal(tensors.tail[other], before[other])


def test_rows_and_extras_that_do_not_fit_are_refused() -> None:
    cache, k, v = filled("nested")
    tensors = engine(cache.tensors())
    rows, starts = packed(query(1, heads=2)[0], query(1, heads=2)[0])
    ask = {"scale": 0.125, "most": 1}
    with pytest.raises(ValueError, match=r"expected \[tokens, H, D\], as there are starts"):
        ops.attend(query(1, batch=2, heads=2), tensors, cache.numerics, starts=starts, **ask)
    with pytest.raises(ValueError, match=r"expected \[B, H, T, D\]"):
        ops.attend(rows, tensors, cache.numerics, **ask)
    with pytest.raises(ValueError, match=r"contiguous starts \[3\]"):
        ops.attend(rows, tensors, cache.numerics, starts=starts[:2], **ask)
    new = [packed(x[0, :, :1], x[1, :, :1])[0] for x in (k, v)]
    with pytest.raises(ValueError, match="need most"):
        ops.append(new[0], new[1], tensors, cache.numerics, starts=starts)
    assert tensors.k_channel_scale is not None
    expanded = tensors.k_channel_scale.expand(2, -1, -1)
    with pytest.raises(ValueError, match="for all sequences"):
        ops.attend(rows, dataclasses.replace(tensors, k_channel_scale=expanded), cache.numerics, starts=starts, **ask)
    wrong = dataclasses.replace(tensors, sink_value=tensors.sink_value.contiguous())
    with pytest.raises(ValueError, match="of the same strides"):
        ops.attend(rows, wrong, cache.numerics, starts=starts, **ask)
