"""``thrift bench crossover`` without a GPU: what is measured, when it counts, and what follows."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch

from thrift_attn import ThriftConfig, attention
from thrift_attn.crossovers import CROSSOVERS, Server
from thrift_lab.bench import crossover
from thrift_lab.bench.crossover import (
    CHUNKED,
    CrossoverRecord,
    CrossoverRow,
    Shape,
    check,
    conclusions,
    crossing,
    measure,
    promoted,
    shapes,
    tensors,
    worst_ratio,
)

RECORDS = sorted((Path(__file__).parents[2] / "benchmarks" / "results" / "crossover").glob("*.json"))
SMALL = Shape(head_dim=32, queries=1300, keys=1300, q_heads=4, kv_heads=2)
CPU = torch.device("cpu")


def fake(ratios: dict[int, float], chunks: dict[int, float], side: str = "SDPA", dim: int = 64) -> CrossoverRecord:
    """A record in which exact attention takes 100 us and thrift ``ratio`` times as long."""
    record = CrossoverRecord(context={}, base_format="fp8")
    for keys, found in ((None, ratios), (CHUNKED, chunks)):
        for queries, ratio in found.items():
            shape = Shape(head_dim=dim, queries=queries, keys=keys or queries)
            rounds = {"thrift": [[1000.0], [100 * ratio], [100 * ratio, 1.0, 9999.0]], side: [[100.0]] * 3}
            record.rows += [CrossoverRow(shape=shape, side=name, rounds_us=us) for name, us in rounds.items()]  # type: ignore[arg-type]
    return record


def test_where_the_lines_cross() -> None:
    assert crossing([]) is None
    assert crossing([(1024, 1.2)]) is None
    assert crossing([(1024, 0.9), (2048, 0.8)]) == 0
    assert crossing([(1024, 2.0), (4096, 0.5)]) == 2048
    assert crossing([(1024, 2.0), (4096, 0.4)]) == 2048  # 1,902 rounded up
    assert crossing([(1024, 0.9), (2048, 1.1), (4096, 0.8)]) == 3072  # the last crossing counts
    assert crossing([(1024, 0.9), (2048, 0.8), (4096, 1.01)]) is None


def test_what_follows_from_a_record(tmp_path: Path) -> None:
    record = fake({1024: 2.0, 4096: 0.5, 8192: 0.4}, {17: 5.0, 256: 3.0, 1024: 0.8})
    assert record.crossover(64, "SDPA") == 2048
    assert record.crossover(64, "SDPA", chunks=True) == 1024
    assert record.crossover(64, "FlashAttention-3") is None
    assert worst_ratio(record, 64, "SDPA", 2048) == pytest.approx(1 / 3)  # 256 queries are not few any more
    both = fake({1024: 2.0, 4096: 0.5}, {17: 5.0, 256: 3.0, 1024: 0.8}, "FlashAttention-3")
    assert worst_ratio(both, 64, "FlashAttention-3", 4096) == 1.0
    assert worst_ratio(both, 64, "FlashAttention-3", 1024) == pytest.approx(1 / 3)  # 256 queries are not few any more
    assert conclusions(record) == [
        "D 64, SDPA: exact below 2,048 keys; chunks of 65,536 keys: thrift is faster from 1,024 queries on",
        "D 64, SDPA: with that, the worst is 0.33 of the speed of exact attention",
    ]
    record.save(tmp_path / "x.json")
    assert CrossoverRecord.load(tmp_path / "x.json").to_json() == record.to_json()


def test_a_run_has_prompts_and_chunks_of_both_head_dims() -> None:
    found = shapes()
    assert len(found) == len(set(found))
    assert {shape.head_dim for shape in found} == {64, 128}
    for row in CROSSOVERS:
        keys = [shape.keys for shape in found if shape.head_dim == row.head_dim and shape.queries == shape.keys]
        assert min(keys) < row.keys < max(keys)
    assert min(shape.queries for shape in found) == 17  # fewer is decode


@pytest.mark.parametrize("queries", [1300, 200])
def test_methods_are_checked_and_then_take_turns(queries: int) -> None:
    shape, order = SMALL.model_copy(update={"queries": queries}), []

    def timer(call, replays):
        order.append(call())
        return [1.0] * replays

    thrift, fa3, sdpa = measure(shape, CPU, replays=2, timer=timer)
    assert "not installed" in fa3.reason
    assert fa3.us is None
    assert thrift.error is not None
    assert sdpa.error is not None
    assert 0 < sdpa.error <= sdpa.allowed < thrift.error <= thrift.allowed
    assert thrift.rounds_us == sdpa.rounds_us == [[1.0, 1.0]] * crossover.ROUNDS
    assert len(order) == 2 * crossover.ROUNDS
    assert torch.equal(order[0], order[2])
    assert not torch.equal(order[0], order[1])
    q, k, v = tensors(shape, CPU, torch.bfloat16)
    stats = attention(q, k, v, config=ThriftConfig(exact_below=0), return_stats=True)[1]
    assert thrift.promoted == pytest.approx(stats.share) == promoted(shape) < 1


def test_a_wrong_output_has_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(side, q, k, v):
        def fails():
            raise RuntimeError("no kernel")

        if side == "thrift":
            return fails
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # sees the future

    monkeypatch.setattr(crossover, "call_of", broken)
    rows = measure(SMALL, CPU, replays=1, timer=lambda *_: [1.0])
    assert rows[2].reason.startswith("wrong: error")
    assert rows[2].rounds_us == []
    assert rows[0].reason == "RuntimeError: no kernel"
    assert rows[0].rounds_us == []
    q, k, v = tensors(SMALL, CPU, torch.bfloat16)
    nan = torch.full_like(q, torch.nan)
    assert check(nan, "SDPA", q, k, v)[0] is None


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_the_table_serves_every_gpu_with_a_record(path: Path) -> None:
    """Rows are those of their source; with them no GPU of the capability has calls below 0.97 of exact attention."""
    record = CrossoverRecord.load(path)
    capability = tuple(int(part) for part in record.context["machine"]["capability"].split("."))
    rows = [row for row in CROSSOVERS if (row.capability, row.base_format) == (capability, record.base_format)]
    assert {(row.head_dim, row.server) for row in rows} == set(product(record.head_dims(), get_args(Server)))
    for row in rows:
        if path.name in row.source:
            assert row.keys == record.crossover(row.head_dim, row.server)
        worst = worst_ratio(record, row.head_dim, row.server, row.keys)
        assert worst is not None
        assert worst >= 0.97


def test_every_row_has_a_record() -> None:
    assert {Path(row.source).name for row in CROSSOVERS} <= {path.name for path in RECORDS}
