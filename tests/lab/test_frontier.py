"""The frontier of cost and loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.tiny_eval import TEXT, save_model
from thrift_lab.eval import frontier as chart
from thrift_lab.eval.frontier import Point
from thrift_lab.eval.runs import load_runs
from thrift_lab.eval.suite import run
from thrift_lab.eval.suite_folder import SuitePlan

METHODS = "fp16,fp4,thrift:budget=0.3,thrift:budget=0.3,compute=16bit,fp8kv,quest:budget=0.5"


def point(name: str, cost: float, loss: float, spread: float = 0.0, phases: tuple = ("decode",)) -> Point:
    return Point(name, name, cost, cost, cost, loss, (loss - spread, loss + spread), phases)


def test_only_what_nothing_beats_in_both_is_on_the_frontier() -> None:
    points = [
        point("a", 1, 0.5),
        point("b", 2, 0.1),
        point("c", 2, 0.2),
        point("d", 3, 0.1),
        point("e", 0.5, 9, phases=("prefill",)),
    ]
    assert [p.method for p in chart.frontier(points, "decode")] == ["a", "b"]
    assert [p.method for p in chart.frontier(points, "prefill")] == ["e"]
    assert [p.method for p in chart.beaten_by(points[3], points, "decode")] == []  # b loses as much
    assert [p.method for p in chart.beaten_by(points[2], points, "decode")] == ["b"]
    knows = replace(points[1], oracle=True)
    assert [p.method for p in chart.frontier([points[0], knows], "decode")] == ["a"]
    assert chart.beaten_by(points[2], [knows], "decode") == []
    unsure = [point("thrift", 2, 0.2, 0.15), point("b", 1, 0.1, 0.15)]
    assert chart.verdicts(unsure) == [
        "`thrift` is not on the frontier of decode: others cost no more and lose less, within the 95% interval."
    ]
    sure = [point("thrift", 2, 0.2), point("b", 1, 0.1)]
    assert chart.verdicts(sure) == ["`thrift` is not on the frontier of decode: `b` costs no more and loses less."]
    assert chart.verdicts(sure[:1]) == ["`thrift` is on the frontier of decode."]


def test_a_run_becomes_a_table_and_a_picture(tmp_path: Path) -> None:
    model, text = str(save_model(tmp_path / "model")), tmp_path / "houses.txt"
    text.write_text(TEXT)
    run(SuitePlan(model, METHODS, texts=(str(text),), nll_lengths=(200,)), tmp_path / "run", device="cpu")
    (loaded,) = load_runs([tmp_path / "run"])
    assert chart.token_bytes(loaded) == 4 * 16 * 2 * 1
    points = {p.method: p for p in chart.points_of(loaded)}
    assert points["fp8kv"].read == points["fp8kv"].stored == 64
    assert points["fp8kv"].phases == points["thrift:budget=0.3,compute=16bit"].phases == ("decode",)
    assert points["thrift:budget=0.3"].phases == points["fp4"].phases == ("prefill",)
    assert points["quest:budget=0.5"].phases == ("prefill", "decode")
    table = chart.markdown(loaded, list(points.values()))
    assert table.count("| `") == len(points) == 5
    assert "frontier of prefill" in table
    assert chart.draw([loaded], tmp_path / "chart.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to draw"):
        chart.draw([], tmp_path / "none.png")
