"""A step over a packed batch: prompts at once or in parts, beside sequences that decode, on shared pages."""

from __future__ import annotations

import torch
from torch import Tensor

from thrift_attn import ThriftConfig
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.paged_rows import SharedPages
from thrift_attn.vllm import engine_step
from thrift_attn.vllm.engine_step import LayerOptions, PromptRow, StepRows, attend_step
from thrift_attn.vllm.page_record import PageRecord

HQ, HKV, DIM = 4, 2, 64
WHOLE = LayerOptions(
    prompts=ThriftConfig(budget=1.0),
    pages=DecodeNumerics.resolve(ThriftConfig.for_cache(budget=1.0, base_format="nvfp4")),
    scale=DIM**-0.5,
    softcap=None,
)


class Engine:
    """The least of an engine: sequences with pages and a ring each, steps over some of them."""

    def __init__(self, options: LayerOptions = WHOLE):
        record = PageRecord(DIM)
        raw = torch.full((40, HKV, 64, record.token_bytes), 0x7F, dtype=torch.uint8)  # NaN where nothing was written
        rings = torch.full((8, HKV, 128, record.token_bytes), 0x7F, dtype=torch.uint8)
        scales = torch.ones(HKV, DIM), torch.ones(HKV)
        views = record.pages(raw, torch.float16)
        self.layer = SharedPages(*views, record.rings(rings, torch.float16), *scales)
        self.options, self.tokens = options, [0] * 8
        self.table = torch.arange(40, dtype=torch.int32).view(8, 5)

    def step(self, parts: list[tuple[int, Tensor, Tensor, Tensor]], padding: int = 0) -> list[Tensor]:
        """Feed (sequence, q, k, v ``[H, T, D]``) and return what each sequence gets; those of up to 16 tokens come first."""
        counts = [part[1].shape[1] for part in parts]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        q, k, v = (torch.cat([part[i].transpose(0, 1) for part in parts]) for i in (1, 2, 3))
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding), value=torch.nan) for x in (q, k, v))
        decoding = sum(count <= 16 for count in counts)
        prompts = [
            PromptRow(row, int(starts[row]), counts[row], self.tokens[parts[row][0]])
            for row in range(decoding, len(parts))
        ]
        for (seq, *_), count in zip(parts, counts, strict=True):
            self.tokens[seq] += count
        seqs = torch.tensor([part[0] for part in parts])
        rows = StepRows(
            starts=torch.cat([starts, starts[-1:].expand(2)]),  # two padded rows
            lengths=torch.tensor([*(self.tokens[seq] for seq in seqs.tolist()), 0, 0], dtype=torch.int32),
            page_table=torch.cat([self.table[seqs], torch.zeros(2, 5, dtype=torch.int32)]),
            decoding=decoding if prompts else decoding + 2,
            prompts=prompts,
        )
        rings = torch.cat([seqs.int(), torch.zeros(2, dtype=torch.int32)])
        out = torch.zeros_like(q)
        attend_step(q, k, v, out, rows=rows, rings=rings, layer=self.layer, options=self.options)
        assert not out[int(starts[-1]) :].any()
        return [out[a:b].transpose(0, 1) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]


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


def test_the_first_token_is_exact_in_one_tile_only(monkeypatch) -> None:
    """Block 2 begins with a token like others: were it taken for a first token, its key would be the centre of its block."""
    low = LayerOptions(
        prompts=ThriftConfig(budget=0.0, base_format="nvfp4", compute="16bit"),
        pages=WHOLE.pages,
        scale=WHOLE.scale,
        softcap=None,
    )
    data = draw(280, 3)
    data[1][:, 128] += 30  # far from all others of its block
    errors = []
    for tile in (2, 100):
        monkeypatch.setattr(engine_step, "TILE_BLOCKS", tile)
        engine = Engine(low)
        engine.step([(0, *cut(data, 0, 256))])
        out = engine.step([(0, *cut(data, 256, 280))])[0].float()
        errors.append(float((out - exact(*data)[:, 256:]).norm()))
    assert errors[0] < 1.2 * errors[1]
