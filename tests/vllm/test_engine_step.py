"""A step over a packed batch: prompts at once or in parts, beside sequences that decode, on shared pages."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from support.live_memory import LiveMemory
from thrift_attn import ThriftConfig
from thrift_attn.dispatch import interpreted
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.paged_rows import SharedPages
from thrift_attn.vllm import engine_step
from thrift_attn.vllm.engine_step import LayerOptions, PromptRow, StepRows, attend_step
from thrift_attn.vllm.page_record import PageRecord
from thrift_attn.vllm.plain_pages import PlainPages

HQ, HKV, DIM = 4, 2, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = interpreted() or DEVICE.type == "cuda"
DECODES = 12  # tokens of a step that a ring of 75 takes beside the 63 of a block
WHOLE = LayerOptions(
    prompts=ThriftConfig(budget=1.0),
    pages=DecodeNumerics.resolve(ThriftConfig.for_cache(budget=1.0, base_format="nvfp4")),
    scale=DIM**-0.5,
    softcap=None,
)


class Engine:
    """The least of an engine: sequences with pages and a ring each, steps over some of them."""

    def __init__(self, options: LayerOptions = WHOLE, kernels: bool = False):
        record = PageRecord(DIM)
        raw = torch.full((40, HKV, 64, record.token_bytes), 0x7F, dtype=torch.uint8)  # NaN where nothing was written
        rings = torch.full((8, HKV, 128, record.token_bytes), 0x7F, dtype=torch.uint8)
        scales = (torch.ones(HKV, DIM, device=DEVICE), torch.ones(HKV, device=DEVICE))
        views = record.pages(raw.to(DEVICE), torch.float16)
        self.layer = SharedPages(*views, record.rings(rings.to(DEVICE), torch.float16), *scales)
        self.kernels, self.options, self.tokens = kernels, options, [0] * 8
        self.table = torch.arange(40, dtype=torch.int32).view(8, 5)
        self.watch: Any = nullcontext()  # of what a step does

    def step(self, parts: list[tuple[int, Tensor, Tensor, Tensor]], padding: int = 0) -> list[Tensor]:
        """Feed (sequence, q, k, v ``[H, T, D]``) and return what each sequence gets; those that decode come first."""
        counts = [part[1].shape[1] for part in parts]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        q, k, v = (torch.cat([part[i].transpose(0, 1) for part in parts]) for i in (1, 2, 3))
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding), value=torch.nan) for x in (q, k, v))
        decoding = sum(count <= DECODES for count in counts)
        prompts = [
            PromptRow(row, int(starts[row]), counts[row], self.tokens[parts[row][0]])
            for row in range(decoding, len(parts))
        ]
        for (seq, *_), count in zip(parts, counts, strict=True):
            self.tokens[seq] += count
        seqs = torch.tensor([part[0] for part in parts])
        rows = StepRows(
            starts=torch.cat([starts, starts[-1:].expand(2)]).to(DEVICE),  # two padded rows
            lengths=torch.tensor([*(self.tokens[seq] for seq in seqs.tolist()), 0, 0], dtype=torch.int32).to(DEVICE),
            page_table=torch.cat([self.table[seqs], torch.zeros(2, 5, dtype=torch.int32)]).to(DEVICE),
            decoding=decoding if prompts else decoding + 2,
            most=max(counts[:decoding], default=0),
            prompts=prompts,
        )
        rings = torch.cat([seqs.int(), torch.zeros(2, dtype=torch.int32)]).to(DEVICE)
        q, k, v = (x.to(DEVICE) for x in (q, k, v))
        out = torch.zeros_like(q)
        layer: Any = self.layer
        if self.kernels:
            from thrift_attn.vllm.kernel_pages import KernelLayer, KernelPages, step_budget

            layer = KernelLayer(layer, self.options, step_budget(self.options, 5 * 64, DEVICE))
        with self.watch:
            if self.kernels:
                pages = KernelPages(layer, rows, rings, run=rows)
            else:
                pages = PlainPages(layer, rows, rings, self.options)
            attend_step(q, k, v, out, rows=rows, pages=pages, options=self.options)
        return [x.transpose(0, 1).cpu() for x in out[: int(starts[-1])].split(counts)]


def draw(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(heads, tokens, DIM, generator=g).half() for heads in (HQ, HKV, HKV))  # type: ignore


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q[None].float(), k[None].float(), v[None].float(), is_causal=True, enable_gqa=True
    )[0]


def cut(x: tuple[Tensor, ...], a: int, b: int) -> tuple[Tensor, ...]:
    return tuple(one[:, a:b] for one in x)


def test_parts_of_prompts_beside_decode_are_exact_up_to_residuals(monkeypatch) -> None:
    monkeypatch.setattr(engine_step, "TILE_BLOCKS", 2)
    engine, long, short = Engine(), draw(300, 0), draw(40, 1)
    found_long, found_short = [], []
    plan = [
        ((0, 100), (0, 20)),
        ((100, 101), (20, 21)),
        ((101, 230), (21, 24)),
        ((230, 260), (24, 40)),
        ((260, 300), None),
    ]
    for of_long, of_short in plan:
        parts = [(0, *cut(long, *of_long))] + ([] if of_short is None else [(1, *cut(short, *of_short))])
        parts.sort(key=lambda part: part[1].shape[1])
        for (seq, *_), out in zip(parts, engine.step(parts, padding=3), strict=True):
            (found_long if seq == 0 else found_short).append(out)
    assert torch.cat(found_short, 1).sub(exact(*short)).abs().max() < 2e-3  # all of it was in 16 bits
    error = torch.cat(found_long, 1).float() - exact(*long)
    assert error.norm() / exact(*long).norm() < 0.01


def test_a_prefix_that_another_sequence_completes_in_the_same_step_is_read_whole() -> None:
    first, second = draw(128, 0), draw(90, 1)
    engine = Engine()
    engine.table[1, :2] = engine.table[0, :2]
    engine.tokens[1] = 128  # a hit on what sequence 0 is about to compute, which comes later in the batch
    _, hit = sorted(zip((1, 0), engine.step([(1, *second), (0, *first)]), strict=True), key=lambda pair: pair[0])
    alone = Engine()
    alone.step([(1, *first)])
    assert torch.equal(hit[1], alone.step([(1, *second)])[0])


@pytest.mark.skipif(not KERNELS, reason="TRITON_INTERPRET=1, or a GPU")
def test_kernels_write_and_attend_as_plain_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in parts beside one that decodes, drafts that are taken back: the same bytes, the same output."""
    monkeypatch.setattr(engine_step, "TILE_BLOCKS", 1)
    pages = DecodeNumerics.resolve(ThriftConfig.for_cache(budget=0.5, base_format="nvfp4"))
    options = LayerOptions(prompts=WHOLE.prompts, pages=pages, scale=WHOLE.scale, softcap=None)
    engines = [Engine(options, kernels) for kernels in (False, True)]
    for engine in engines:
        engine.layer.k_channel_scale.copy_(2.0 ** (torch.arange(DIM) % 5 - 2))
        engine.layer.v_head_scale.mul_(4)
    first, second, drafts = draw(190, 5), draw(160, 6), draw(12, 7)
    steps = [
        [(0, *cut(first, 0, 100)), (1, *cut(second, 0, 122))],
        [(1, *drafts), (0, *cut(first, 100, 190))],  # block 1 of sequence 1 is packed with what is taken back
        [(1, *cut(second, 124, 130))],  # of twelve tokens two were right
    ]
    for number, parts in enumerate(steps):
        found = [engine.step(parts, padding=2) for engine in engines]
        for plain, kernels in zip(*found, strict=True):
            assert (plain.float() - kernels.float()).abs().max() < 4e-3
        if number == 1:
            for engine in engines:
                engine.tokens[1] -= 10
    written = engines[0].table[:2, :2].flatten().long()
    for plane, kernels in zip(engines[0].layer.pool, engines[1].layer.pool, strict=True):
        assert torch.equal(plane[written].view(torch.uint8).cpu(), kernels[written].view(torch.uint8).cpu())
    for name in ("block0_mean", "sink_value"):
        one, two = (getattr(engine.layer, name)[written[::2]].cpu() for engine in engines)
        assert torch.equal(one, two)


@pytest.mark.skipif(not KERNELS, reason="TRITON_INTERPRET=1, or a GPU")
def test_sequences_that_are_attended_after_others_are_attended_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one in the room of one, tokens packed, beside all at once: parts of other sizes are merged."""
    from thrift_attn.vllm import kernel_pages

    found, lengths = [], (70, 14, 66)
    for room in (kernel_pages.ROOM, 1):
        monkeypatch.setattr(kernel_pages, "ROOM", room)
        engine = Engine(kernels=True)
        engine.step([(seq, *draw(tokens, seq)) for seq, tokens in enumerate(lengths)])
        found.append(engine.step([(seq, *draw(tokens, 10 + seq)) for seq, tokens in enumerate((2, 5, 1))], padding=2))
    for together, alone in zip(*found, strict=True):
        assert (together.float() - alone.float()).abs().max() < 2e-3


def test_so_many_sequences_are_attended_at_a_time_that_their_buffers_fit() -> None:
    pytest.importorskip("triton")
    from thrift_attn.vllm.kernel_pages import ROOM, rows_at_once

    for heads, group, most, blocks, dim in [
        (8, 4, 1, 2048, 128),
        (8, 4, 12, 2048, 128),
        (1, 8, 12, 16384, 128),
        (32, 1, 1, 64, 64),
    ]:
        count = rows_at_once(heads, group, most, blocks, dim)
        rows = 8 if group * most <= 8 else 16 * group
        assert count == 1 or count % 4 == 0
        assert count * heads * blocks * (rows + 3) * 4 <= ROOM
        assert count * heads <= 65535
    assert rows_at_once(8, 4, 1, 2048, 128) > 300
    assert rows_at_once(32, 8, 12, 65536, 128) == 1


@pytest.mark.skipif(not KERNELS, reason="TRITON_INTERPRET=1, or a GPU")
@pytest.mark.parametrize("tokens", [1, DECODES])
def test_a_rehearsed_step_of_decode_writes_nothing(tokens: int) -> None:
    from thrift_attn.vllm import kernel_pages

    pages = DecodeNumerics.resolve(ThriftConfig.for_cache(budget=0.5, base_format="nvfp4"))
    options = LayerOptions(prompts=WHOLE.prompts, pages=pages, scale=WHOLE.scale, softcap=None)
    q, k, v = (x.transpose(0, 1).to(DEVICE) for x in draw(20, 0))
    out = torch.full_like(q, 7)
    kernel_pages.rehearse_decode(
        q, k, v, out, record=PageRecord(DIM), layer=options, budget=kernel_pages.step_budget(options, 100, DEVICE),
        sequences=3, block_tokens=128, most=tokens,
    )  # fmt: skip
    assert (out == 7).all()


@pytest.mark.skipif(not KERNELS, reason="TRITON_INTERPRET=1, or a GPU")
def test_no_step_takes_more_memory_than_what_was_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine measures memory once, before it gives the rest to pages."""
    from thrift_attn.vllm import kernel_pages

    monkeypatch.setattr(engine_step, "TILE_BLOCKS", 1)
    monkeypatch.setattr(kernel_pages, "ROOM", 80_000)
    if interpreted():  # copies what kernels are given; what they compute is tested above
        from triton.runtime.interpreter import InterpretedFunction

        monkeypatch.setattr(InterpretedFunction, "run", lambda *given, **options: None)
    most, record = 150, PageRecord(DIM)
    q, k, v = (x.transpose(0, 1).to(DEVICE) for x in draw(most, 0))
    out = torch.full_like(q, 7)
    budget = kernel_pages.step_budget(WHOLE, 5 * 64, DEVICE)
    with LiveMemory() as of_prompts:
        engine_step.rehearse_prompts(q, k, v, WHOLE, prompts=min(8, most // (DECODES + 1)), blocks=5)
    with LiveMemory() as of_decode:
        for tokens in (1, DECODES):
            kernel_pages.rehearse_decode(
                q, k, v, out, record=record, layer=WHOLE, budget=budget, sequences=8, block_tokens=128, most=tokens
            )
    assert (out == 7).all()
    engine, peaks = Engine(kernels=True), []
    every = [(seq, *draw(18, seq)) for seq in range(8)]
    one_by_one = [(seq, *draw(1, seq)) for seq in range(8)]
    drafts = [(seq, *draw(DECODES, seq)) for seq in range(8)]
    mixed = [*one_by_one[:5], (5, *draw(DECODES, 5)), (6, *draw(60, 6)), (7, *draw(70, 7))]
    largest = max(of_prompts.peak, of_decode.peak)
    steps = [
        (every, largest),
        (one_by_one, of_decode.peak),
        (drafts, of_decode.peak),
        (mixed, largest),
        ([(0, *draw(most, 0))], largest),
        ([*one_by_one[1:], (0, *draw(most - 7, 1))], largest),
    ]
    for parts, bound in steps:
        engine.watch = LiveMemory()
        engine.step(parts)
        peaks.append(engine.watch.peak)
        assert 0 < engine.watch.peak <= bound
    assert max(peaks[1:3]) > 0.5 * of_decode.peak
    assert (
        of_decode.peak < 80_000 + 70_000
    )  # and a page, a ring and a table to look at; in one piece it would be 207,504
    assert max(peaks) > 0.8 * of_prompts.peak


def test_rows_that_are_run_again_are_read_again() -> None:
    """A runner may keep what it told of a step, and let its lengths go on in place."""
    numbers = torch.tensor([0, 1, 3, 10, 20], dtype=torch.int32)
    rows = StepRows(
        starts=numbers[:3],
        lengths=numbers[3:],
        page_table=torch.zeros(2, 8, dtype=torch.int32),
        decoding=2,
        most=2,
        prompts=[],
    )
    first, second = (LayerOptions(prompts=WHOLE.prompts, pages=WHOLE.pages, scale=1.0, softcap=None) for _ in range(2))
    before = rows.before(first)
    assert before.tolist() == [9, 18]
    numbers[3:] += 1
    assert rows.before(first) is before  # of another layer
    assert rows.before(second).tolist() == [10, 19]


def test_a_later_part_of_a_prompt_is_attended_exactly_whatever_the_budget(monkeypatch) -> None:
    monkeypatch.setattr(engine_step, "TILE_BLOCKS", 2)
    low = LayerOptions(
        prompts=ThriftConfig(budget=0.0, base_format="nvfp4"), pages=WHOLE.pages, scale=WHOLE.scale, softcap=None
    )
    data, engine = draw(280, 3), Engine(low)
    want = exact(*data)
    first = engine.step([(0, *cut(data, 0, 250))])[0].float() - want[:, :250]
    later = engine.step([(0, *cut(data, 250, 280))])[0].float() - want[:, 250:]
    assert later.norm() / want[:, 250:].norm() < 0.01
    assert first.norm() / want[:, :250].norm() > 0.05


def test_what_kernels_count_on_is_checked() -> None:
    numbers = torch.zeros(4, 8, dtype=torch.int32)
    given = {"starts": numbers[0, :3], "lengths": numbers[0, :2], "page_table": numbers[:2], "decoding": 2, "most": 1}
    StepRows(**given, prompts=[])
    with pytest.raises(ValueError, match=r"expected a contiguous page_table, got strides \(8, 1\)"):
        StepRows(**{**given, "page_table": numbers[:2, :3]}, prompts=[])
    with pytest.raises(ValueError, match="expected a contiguous lengths"):
        StepRows(**{**given, "lengths": numbers[:2, 0]}, prompts=[])
