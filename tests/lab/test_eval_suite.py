"""Answers, eviction, cost, error concentration, resumable runs and their report, on a tiny random model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as processes
import torch.nn.functional as F
from typer.testing import CliRunner

from support.tiny_eval import LIMIT, loaded, save_model
from thrift_attn import attention
from thrift_attn.config import ThriftConfig, fraction
from thrift_lab import cli
from thrift_lab.eval import charts, dated, figures, harness, page, speed
from thrift_lab.eval.answer import answer, stop_tokens
from thrift_lab.eval.concentration import FP4, SHARES, measure, of_model
from thrift_lab.eval.config_cost import decode_cost, prefill_cost
from thrift_lab.eval.cost import at_equal_cost, costs
from thrift_lab.eval.eviction import KERNEL, WINDOW, Eviction, evict, kept_tokens, votes, watching
from thrift_lab.eval.methods import Method, described, from_description, parse_method, parse_methods
from thrift_lab.eval.nll import run_window
from thrift_lab.eval.presets import BUDGETS, full, quick, with_baselines
from thrift_lab.eval.run_nll import evaluate
from thrift_lab.eval.runs import Run, load_runs
from thrift_lab.eval.suite import run
from thrift_lab.eval.suite_folder import Folder, Key, SuitePlan, key_of
from thrift_lab.eval.suite_samples import Samples
from thrift_lab.eval.suite_workers import spread
from thrift_lab.eval.summary import summarise
from thrift_lab.extras import MissingExtra
from thrift_lab.models import Loaded
from thrift_lab.records import MARK, OLDER
from thrift_lab.style import COLOURS, OTHER, colour

TEXT = " ".join(
    f"The {a} {b} near the {c} {d}s {n} times."
    for n, (a, b, c, d) in enumerate(
        (a, b, c, d)
        for a in ("red", "old", "wide", "calm", "tall")
        for b in ("house", "river", "stone", "tower", "field")
        for c in ("hill", "road", "wood", "lake", "wall")
        for d in ("turn", "rise", "fall", "rest", "sing")
    )
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    save_model(folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny(place: Path) -> Loaded:
    return loaded(place / "model")


def a_plan(place: Path, **changes: Any) -> SuitePlan:
    options: dict[str, Any] = {
        "model": str(place / "model"),
        "methods": "fp16,fp4,thrift:budget=0.3,topk:budget=0.5,snapkv:keep=0.5",
        "texts": (str(place / "text.txt"),),
        "nll_lengths": (128, 200),
        "windows": 2,
        "tasks": "longbench_lcc,longbench_trec",
        "lengths": (400,),
        "samples": 2,
        "max_new": 3,
        "data": "standin",
        "concentration": 150,
    }
    return SuitePlan(**(options | changes))


# -- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_models_own_generate(tiny: Loaded) -> None:
    prompt, gold = list(range(3, 93)), [5, 9, 40]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        own = tiny.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
        logits = tiny.model(torch.tensor([prompt + gold])).logits[0, len(prompt) - 1 : -1]
    stops = stop_tokens(tiny.model, tiny.tokenizer)
    expected = own[: next((i for i, token in enumerate(own) if token in stops), len(own))]
    for spec in ("fp16", "thrift:budget=1", "snapkv:keep=1"):
        given = answer(tiny.model, parse_method(spec), prompt, gold, 6, stops)
        assert given.tokens == expected, spec
        assert given.gold_nll == pytest.approx(float(F.cross_entropy(logits, torch.tensor(gold))), rel=1e-4), spec
    assert answer(tiny.model, parse_method("fp16"), prompt, gold, 6, {own[2]}).tokens == own[:2]
    low = answer(tiny.model, parse_method("fp4"), prompt, gold, 1, stops)
    assert low.stats is not None
    assert low.stats.share == 0
    assert abs(low.gold_nll - float(F.cross_entropy(logits, torch.tensor(gold)))) > 1e-4
    assert tiny.model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="prompt and right answer must have tokens, got 0 and 3"):
        answer(tiny.model, parse_method("fp16"), [], gold, 6, stops)


def test_logits_that_are_not_finite(tiny: Loaded, place: Path) -> None:
    broken = loaded(place / "model").model
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="'fp16' gave logits that are not finite"):
        answer(broken, parse_method("fp16"), [3, 4], [5], 2, set())


def test_eviction_has_no_nll_of_a_text(tiny: Loaded) -> None:
    with pytest.raises(NotImplementedError, match="has no NLL of a text read in one go"):
        run_window(tiny.model, parse_method("snapkv"), torch.arange(20))


# -- eviction ---------------------------------------------------------------------------------------------------------


def test_snapkv_keeps_what_the_last_queries_look_at() -> None:
    torch.manual_seed(0)
    tokens, dim = 200, 16
    keys = 0.1 * torch.randn(2, tokens, dim)
    queries = 0.1 * torch.randn(4, WINDOW, dim)
    keys[0, 50], queries[:2] = 3.0, queries[:2] + 1.0  # both heads of KV head 0 look at token 50
    keys[1, 120], queries[2:] = 3.0, queries[2:] + 1.0
    kept = kept_tokens(queries, keys, 1.0, 0.3)
    assert kept.shape == (2, 60)
    assert all(row.tolist() == sorted(set(row.tolist())) for row in kept)
    half = KERNEL // 2
    assert set(range(50 - half, 51 + half)) <= set(kept[0].tolist())  # neighbours come along
    assert set(range(120 - half, 121 + half)) <= set(kept[1].tolist())
    assert set(range(tokens - WINDOW, tokens)) <= set(kept[0].tolist())
    assert kept_tokens(queries, keys, 1.0, 1.0).tolist() == [list(range(tokens))] * 2
    assert kept_tokens(queries, keys, 1.0, 0.01).shape == (2, WINDOW + 1)
    # by hand: two keys before a window of one query; the softmax of (-50, log 3, 0) is (0, 3, 1) / 4, and 3/4 is the larger
    hand = votes(torch.ones(1, 1, 1), torch.tensor([[[0.0], [3.0], [1.0]]]).log().clamp(min=-50), 1.0)
    assert hand.tolist() == [[pytest.approx(3 / 4)] * 2]


def test_evict_needs_a_watched_layer(tiny: Loaded) -> None:
    cache = SimpleNamespace(layers=[SimpleNamespace()])
    with watching(tiny.model), pytest.raises(NotImplementedError, match="layer 0 of LlamaForCausalLM has no attention"):
        evict(tiny.model, cache, 0.5)
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
            Eviction(keep)
    assert parse_method("snapkv:keep=0.3") == Method("snapkv:keep=0.3", None, Eviction(0.3))
    assert parse_method("snapkv:keep=0.3").family == "snapkv"
    with pytest.raises(ValueError, match="'snapkv' has no option 'budget': it takes keep"):
        parse_method("snapkv:budget=0.3")


# -- cost -------------------------------------------------------------------------------------------------------------


def test_costs_by_hand() -> None:
    thrift, paper = ThriftConfig(base_format="nvfp4"), ThriftConfig.paper()
    assert prefill_cost(None, 0) == decode_cost(None, 0) == 1
    assert prefill_cost(paper, 0.0) == 0.25
    assert prefill_cost(paper, 0.05) == pytest.approx(0.05 + 0.95 / 4 + 1 / 8192)
    assert prefill_cost(thrift, 0.05) == pytest.approx(0.05 + 0.95 * (1 / 4 + 1 / 128) + 1 / 8192)
    assert prefill_cost(thrift, 1.0) == 1
    assert prefill_cost(thrift.with_(compute="16bit"), 0.0) == pytest.approx(1 + 1 / 128)
    assert prefill_cost(thrift.with_(base_format="fp8"), 0.0) == pytest.approx(1 / 2 + 1 / 128)
    assert prefill_cost(thrift, 0.05, "hopper") == pytest.approx(0.05 + 0.95 * (1 + 1 / 128) + 1 / 8192)  # no FP4 there
    assert decode_cost(thrift, 0.05) == pytest.approx(4.5 / 16 + 0.05 * (1 - 4.5 / 16) + 1 / 128)
    assert decode_cost(thrift.with_(promoted_storage="nested"), 0.05) == pytest.approx(1.05 * 4.5 / 16 + 1 / 128)
    assert decode_cost(paper, 0.0) == pytest.approx(4.5 / 16)
    assert decode_cost(ThriftConfig.sparse("quest"), 0.3) == pytest.approx(0.3 + 1 / 64)
    assert costs(parse_method("snapkv:keep=0.4"), None) == (1.0, 0.4, 0.4)
    with pytest.raises(ValueError, match="the cost of 'thrift:budget=paper' depends on the length"):
        costs(parse_method("thrift:budget=paper"), None)


@pytest.mark.parametrize("kind", ["quest", "topk", "local", "snapkv"])
def test_baselines_at_equal_cost(kind: Any) -> None:
    to = parse_method("thrift")
    found = at_equal_cost(kind, to)
    assert parse_method(found.name) == found
    which = 2 if kind == "snapkv" else 0
    assert costs(found, None)[which] == pytest.approx(costs(to, None)[which], abs=1e-4)


def test_presets() -> None:
    assert {name.partition("_")[0] for name in quick().tasks.split(",")} == {"ruler", "helmet", "longbench"}
    names = full().methods.split(",")
    assert len(names) == len(set(names)) == 3 + 2 * len(BUDGETS) + 1 + 4
    for preset in (quick(), full()):
        assert {name.partition(":")[0] for name in preset.methods.split(",")} >= {
            "fp16",
            "fp4",
            "thrift",
            "quest",
            "snapkv",
        }
    assert with_baselines(["fp16"], "thrift").count(",") == 4


# -- error concentration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FP4, FP4.with_(base_format="mxfp4", scales="best"), FP4.with_(center="block")])
def test_concentration_measures_the_error_of_attention(config: ThriftConfig) -> None:
    torch.manual_seed(0)
    q, k, v = 2 * torch.randn(4, 300, 32), 2 * torch.randn(2, 300, 32), torch.randn(2, 300, 32)
    k[:, :40] *= 3  # some blocks weigh more
    found = measure(q, k, v, 0.2, config=config)
    low, exact = (
        attention(q[None], k[None], v[None], scale=0.2, config=c)[0]
        for c in (config.with_(budget=fraction(0)), config.with_(budget=fraction(1)))
    )
    for head in found:
        gap = (low - exact)[head.head]
        assert head.error == pytest.approx(float(gap.square().sum() / exact[head.head].square().sum()), rel=1e-3)
        assert head.pairs == 15  # five query blocks see 1 + 2 + 3 + 4 + 5 blocks
        assert len(head.shares) == len(SHARES)
        assert list(head.shares) == sorted(head.shares)
        assert list(head.mass) == sorted(head.mass)
        assert head.shares[-1] == pytest.approx(1)
        assert head.mass[-1] == pytest.approx(1)
    for wrong in (
        FP4.with_(compute="16bit"),
        FP4.with_(base_format="fp8"),
        FP4.with_(center="all"),
        FP4.with_(smooth="channel"),
    ):
        with pytest.raises(
            ValueError, match="error concentration is that of 4-bit formats with compute='fp4', center 'none'"
        ):
            measure(q, k, v, 0.2, config=wrong)


def test_concentration_of_a_model(tiny: Loaded) -> None:
    found = of_model(tiny.model, torch.arange(150))
    assert [(head.layer, head.head) for head in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(0 < head.error < 1 for head in found)
    assert tiny.model.config._attn_implementation == "sdpa"


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, dict[str, Any]]:
    return place / "run", run(a_plan(place), place / "run", device="cpu")


def test_a_run_and_its_metrics(finished: tuple[Path, dict[str, Any]], tiny: Loaded) -> None:
    folder, metrics = finished
    records = Folder(folder).records()
    kinds = [record["kind"] for record in records]
    # NLL: two lengths, two windows, four methods that have one; tasks: two, two samples, five methods
    assert (kinds.count("nll"), kinds.count("task"), kinds.count("concentration")) == (16, 20, 1)
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    rows = {(row["length"], row["method"]): row for row in metrics["nll"]}
    mine = [r for r in records if r["kind"] == "nll" and r["length"] == 200 and r["method"] == "fp4"]
    assert rows[200, "fp4"]["tokens"] == 2 * 199
    assert rows[200, "fp4"]["nll"] == pytest.approx(sum(r["nll"] for r in mine) / 2, abs=1e-4)
    assert rows[200, "fp4"]["loss"] == pytest.approx(rows[200, "fp4"]["nll"] - rows[200, "fp16"]["nll"], abs=1e-6)
    low, high = rows[200, "thrift:budget=0.3"]["loss_interval"]
    assert low <= rows[200, "thrift:budget=0.3"]["loss"] <= high
    assert (200, "snapkv:keep=0.5") not in rows
    tasks = {(row["task"], row["method"]): row for row in metrics["tasks"]}
    assert tasks["longbench", "fp4"]["samples"] == tasks["all", "fp4"]["samples"] == 4
    own = [r["gold_nll"] for r in records if r["kind"] == "task" and r["method"] == "topk:budget=0.5"]
    assert tasks["all", "topk:budget=0.5"]["gold_nll"] == pytest.approx(sum(own) / 4)
    facts = {row["name"]: row for row in metrics["methods"]}
    assert facts["snapkv:keep=0.5"]["decode_cost"] == 0.5
    assert 0.2 < facts["thrift:budget=0.3"]["share"] < 0.5
    assert [row["from"] for row in metrics["positions"] if row["method"] == "fp4"] == [0, 64, 128, 192]
    found = metrics["concentration"][0]
    assert found["heads"] == 4
    assert found["error_share"][-1] == pytest.approx(1, abs=1e-4)
    environment = json.loads((folder / "environment.jsonl").read_text().splitlines()[0])
    assert environment["model"]["head_dim"] == 16
    assert {"python", "torch", "rouge"} <= set(environment["versions"])


def test_a_finished_run_does_nothing_more(finished: tuple[Path, dict[str, Any]], place: Path) -> None:
    folder, metrics = finished
    before = (folder / "predictions.jsonl").read_bytes()
    assert run(a_plan(place), folder, device="cpu") == metrics
    assert (folder / "predictions.jsonl").read_bytes() == before
    assert len((folder / "environment.jsonl").read_text().splitlines()) == 2


def test_another_plan_needs_another_folder(finished: tuple[Path, dict[str, Any]], place: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds a run of another plan \(seed: there 0, asked 1\): give another folder"
    ):
        run(a_plan(place, seed=1), finished[0], device="cpu")


def test_half_a_line_is_cut_off(finished: tuple[Path, dict[str, Any]], tmp_path: Path, place: Path) -> None:
    lines = (finished[0] / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    files = Folder(tmp_path / "run")
    files.begin(a_plan(place))
    files.lines.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    assert len(files.records()) == 5
    files.begin(a_plan(place))
    assert files.lines.read_bytes() == b"".join(lines[:5])
    files.append(json.loads(lines[4]))
    with pytest.raises(ValueError, match="two lines about one sample and method"):
        files.records()


KILLED = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from thrift_lab.eval.suite import run
from thrift_lab.eval.suite_folder import SuitePlan
options = json.loads(sys.argv[1])
options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
run(SuitePlan(**options), Path(sys.argv[2]), device="cpu", progress=lambda *step: time.sleep(0.1))
"""


def test_a_killed_run_goes_on(finished: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    plan = a_plan(place)
    command = [sys.executable, "-c", KILLED, json.dumps(plan.to_dict()), str(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    try:
        deadline = time.monotonic() + 120
        lines = folder / "predictions.jsonl"
        while not (lines.exists() and lines.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run wrote nothing"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = [key_of(record) for record in Folder(folder).records()]
    everything = [key_of(record) for record in Folder(finished[0]).records()]
    assert 3 <= len(before) < len(everything)
    run(plan, folder, device="cpu")
    after = Folder(folder).records()
    assert [key_of(record) for record in after] == everything  # nothing lost, nothing twice, in the same order
    same = {key_of(r): r for r in Folder(finished[0]).records()}
    for record in after:
        if record["kind"] == "task":
            assert record["prediction"] == same[key_of(record)]["prediction"]
            assert record["gold_nll"] == pytest.approx(same[key_of(record)]["gold_nll"], rel=1e-3)


def test_workers_find_what_one_process_finds(
    finished: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    """Whoever measured a sample: the same lines but for the order and the seconds, and a run that goes on with fewer."""
    folder, metrics = finished
    found = run(a_plan(place), tmp_path / "run", device="cpu", workers=2)

    def lines(path: Path) -> dict[Key, dict[str, Any]]:
        return {key_of(line): {k: v for k, v in line.items() if k != "seconds"} for line in Folder(path).records()}

    assert lines(tmp_path / "run") == lines(folder)
    assert {**found, "methods": 0, "nll": 0, "tasks": 0} == {**metrics, "methods": 0, "nll": 0, "tasks": 0}
    for part in ("nll", "tasks"):
        assert [{k: v for k, v in row.items() if "seconds" not in k} for row in found[part]] == [
            {k: v for k, v in row.items() if "seconds" not in k} for row in metrics[part]
        ]
    assert json.loads((tmp_path / "run/environment.jsonl").read_text())["workers"] == 2
    assert run(a_plan(place), tmp_path / "run", device="cpu", workers=2) == found  # nothing is left to do


def test_what_a_worker_raises_is_raised_and_a_worker_that_dies_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the question alone has more than 20 tokens"):
        run(a_plan(place, lengths=(20,)), tmp_path / "short", device="cpu", workers=2)
    plan = a_plan(place, samples=40)
    items = Samples.of(plan, tmp_path, print).items
    lines = spread(plan, tmp_path, [(n, x.keys(parse_methods("fp16"))) for n, x in enumerate(items)], "cpu", "auto", 2)
    next(lines)
    processes.active_children()[0].kill()
    with pytest.raises(RuntimeError, match=r"worker [01] ended with exit code -9: what it was measuring is lost"):
        list(lines)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run(plan, tmp_path, workers=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ()}, "at least one text"),
        ({"nll_lengths": (), "tasks": "", "concentration": 0}, "nothing to run"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"lengths": (1,)}, "lengths must be at least 2"),
    ],
)
def test_bad_plans(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_plan(place, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nll_lengths": (LIMIT + 1,)}, "over the 512 positions"),
        ({"tasks": "longbench_qasper"}, "needs longbench/qasper.jsonl"),
        ({"lengths": (60,)}, "the question alone has more than 60 tokens"),
        ({"samples": 9, "tasks": "longbench_lcc", "data": None}, "longbench_lcc needs longbench/lcc.jsonl"),
        ({"methods": "fp16,fp16"}, "are the same computation"),
        ({"data": "/no/such/folder"}, "no folder '/no/such/folder'"),
    ],
)
def test_what_cannot_run_fails_before_the_first_sample(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(a_plan(place, **changes), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run" / "predictions.jsonl").exists()


def test_summary_compares_only_what_all_have_finished() -> None:
    def line(method: str, index: int, sums: list[float]) -> dict[str, Any]:
        head = {"kind": "nll", "task": "t", "length": 65, "index": index, "method": method}
        return head | {"nll": sum(sums) / 64, "sums": sums, "tokens": 64, "share": 0.0, "unserved": []}

    methods = parse_methods("fp16,fp4,thrift")
    records = [line("fp16", i, [64.0]) for i in range(4)] + [line("fp4", i, [128.0]) for i in range(3)]
    records += [line("thrift", 0, [80.0]), line("thrift", 1, [64.0])]
    rows = {row["method"]: row for row in summarise(methods, records)["nll"]}
    assert rows["fp16"]["windows"] == 2
    assert rows["fp4"]["loss"] == pytest.approx(1)
    assert rows["thrift"]["loss"] == pytest.approx(0.125)
    assert rows["thrift"]["recovered"] == pytest.approx(0.875)
    assert rows["thrift"]["loss_interval"] == pytest.approx((0, 0.25))


def test_our_snapkv_keeps_what_kvpress_keeps() -> None:
    """The record is made by benchmarks/kvpress_snapkv.py, in an environment that has kvpress."""
    record = json.loads((Path(__file__).parents[2] / "benchmarks/results/cpu/kvpress-snapkv.json").read_text())
    sizes = record["sizes"]
    draw = np.random.default_rng(sizes["seed"])
    shape = (sizes["tokens"], sizes["head_dim"])
    q, k = (draw.standard_normal((sizes[heads], *shape), dtype=np.float32) for heads in ("q_heads", "kv_heads"))
    last, keys = torch.from_numpy(2 * q)[:, -WINDOW:], torch.from_numpy(k)
    assert sizes["window"] == WINDOW
    for kernel in (1, KERNEL):
        ours = kept_tokens(last, keys, sizes["head_dim"] ** -0.5, record["keep"], kernel=kernel, pool="mean")
        assert ours.tolist() == record["kept"][str(kernel)]


# -- damaged folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "predictions.jsonl, line 2: not JSON"),
        ("3", "predictions.jsonl, line 2: expected an object; delete it, and a new start makes it again"),
        ('{"kind": "nll"}', "predictions.jsonl, line 2: no 'task' in it; delete it"),
        ('{"kind": "nll", "task": "\xff"}', "predictions.jsonl, line 2: not JSON"),
    ],
)
def test_a_broken_line_is_named(line: str, message: str, place: Path, tmp_path: Path) -> None:
    files = Folder(tmp_path)
    files.begin(a_plan(place))
    whole = {"kind": "nll", "task": "x", "length": 1, "index": 0, "method": "fp16"}
    files.append(whole)
    with files.lines.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    files.append({**whole, "index": 1})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Run.load(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(a_plan(place), tmp_path, device="cpu")


def test_half_a_line_of_the_environment_is_cut_off(place: Path, tmp_path: Path) -> None:
    files = Folder(tmp_path)
    files.begin(a_plan(place))
    files.note({"started": "once"})
    with files.notes.open("ab") as file:
        file.write(b'{"started": "tw')
    assert files.load()[1] == [{"started": "once"}]
    files.begin(a_plan(place))
    files.note({"started": "again"})
    assert files.load()[1] == [{"started": "once"}, {"started": "again"}]


def test_a_damaged_plan_is_one_line(place: Path, tmp_path: Path) -> None:
    Folder(tmp_path).begin(a_plan(place))
    for content, message in (("{", "is not JSON"), ("[]", "schema"), ('{"schema": 1}', "config.json is damaged")):
        (tmp_path / "config.json").write_text(content)
        for call in (lambda: Run.load(tmp_path), lambda: Folder(tmp_path).begin(a_plan(place))):
            with pytest.raises(ValueError, match=message):
                call()


def test_a_second_run_in_the_same_folder_is_refused(place: Path, tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from thrift_lab.eval.suite_folder import Folder\n"
    code += "with Folder(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run is at work in"):
            run(a_plan(place), tmp_path, device="cpu")
        other.kill()
    with Folder(tmp_path).held():  # a killed process holds nothing
        pass


# -- report -----------------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Finds tags that do not match and anything that would be loaded."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("link", "img", "iframe", "object", "embed", "image", "use")
        for name, value in attrs:
            inside = name == "href" and str(value).startswith("#")
            assert inside or name not in ("src", "href", "srcset", "xlink:href", "onload"), (tag, name, value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page(finished: tuple[Path, dict[str, Any]]) -> None:
    from plotly.offline import get_plotlyjs

    loaded_run = Run.load(finished[0])
    text = page.html([loaded_run, replace(loaded_run, name="a <second> & last")])
    assert text.count(get_plotlyjs()) == 1  # the charts need no network
    text = text.replace(get_plotlyjs(), "")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert checker.tags.count("figure") == text.count("Plotly.newPlot(") >= 2 * 6
    assert checker.tags.count("table") == 2 * 5
    assert "<nav" in text
    assert not re.search(r"https?://(?!plot\.ly)|url\(|@import|javascript:", text)
    assert "prefers-color-scheme:dark" in text
    assert "hovertemplate" in text
    assert "nan" not in text.lower().replace("finance", "")
    assert "a &lt;second&gt; &amp; last" in text
    assert "longbench_lcc*" in text
    assert "stand-in made from the text" in text


def test_one_colour_for_a_method_in_every_chart(finished: tuple[Path, dict[str, Any]]) -> None:
    seen = set()
    for chart in figures.of_run(Run.load(finished[0]).metrics):
        kinds = {trace.name.partition(":")[0]: trace for trace in chart.figure.data}
        seen |= set(kinds)
        for kind, trace in kinds.items():
            if kind in COLOURS:
                assert (trace.marker.color or trace.line.color) == COLOURS[kind]
        assert any("thrift" in kind for kind in kinds), chart.title
    assert {"fp4", "thrift"} <= seen
    assert not set(OTHER) & set(COLOURS.values())
    assert colour(f"thrift{MARK}") == colour("thrift:budget=0.1") == COLOURS["thrift"]


def test_contents_lead_to_every_section_and_cells_name_their_column(finished: tuple[Path, dict[str, Any]]) -> None:
    text = page.html([Run.load(finished[0])]).rpartition("</script>")[0]
    links = re.findall(r'href="#([\w-]+)"', text)
    assert len(links) == len(set(links)) == 1 + 3
    for link in links:
        assert text.count(f'id="{link}"') == 1
    assert text.count("<td") == text.count('data-head="')


def test_what_is_unfinished_is_said(finished: tuple[Path, dict[str, Any]]) -> None:
    run = Run.load(finished[0])
    metrics = json.loads(json.dumps(run.metrics))
    (one,) = {row["task"] for row in metrics["tasks"] if not row["group"]} - {"longbench_lcc"}
    metrics["tasks"] = [row for row in metrics["tasks"] if (row["task"], row["method"]) != (one, "thrift:budget=0.3")]
    metrics["nll"] = [row for row in metrics["nll"] if (row["length"], row["method"]) != (200, "fp4")]
    metrics["concentration"] = []
    said = page.unfinished(replace(run, metrics=metrics, plan={**run.plan, "samples": 9}))
    assert said["nll"] == "Unfinished: not every text and length was run with fp4 (- in the tables)."
    assert f"{one} was not run with thrift:budget=0.3" in said["tasks"]
    assert "of 9 planned samples" in said["tasks"]
    assert said["concentration"].startswith("Not measured")
    assert said["nll"] in page.markdown([replace(run, metrics=metrics)])


def test_what_is_older_than_its_default_is_marked(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    today = parse_method("thrift").config
    assert today is not None
    assert dated.marked("thrift", today.to_dict()) == "thrift"
    old = {**today.to_dict(), "sink_token": "none"}
    assert (
        dated.marked("thrift:high=nested", {**old, "promoted_storage": "nested"})
        == f"thrift:promoted_storage=nested{MARK}"
    )
    assert dated.older("thrift", old) == "sink_token=none (today exact)"
    assert dated.older("fp16", None) == ""
    run = Run.load(finished[0])
    metrics = json.loads(json.dumps(run.metrics))
    for row in metrics["methods"]:
        if row["name"] == "thrift:budget=0.3":
            row["config"]["sink_token"] = "none"
    text = page.markdown([replace(run, metrics=metrics)])
    assert f"| `thrift:budget=0.3{MARK}` |" in text
    assert "- thrift:budget=0.3†: recorded with sink_token=none (today exact)" in text
    assert MARK not in page.markdown([run])
    names = {trace.name for chart in figures.of_run(metrics) for trace in chart.figure.data}
    assert {f"thrift{MARK}", f"thrift:budget=0.3{MARK}"} & names
    both = run.with_others([replace(run, metrics=metrics)])  # the same name twice, with two meanings
    assert {"thrift:budget=0.3", f"thrift:budget=0.3{MARK}"} <= set(both.methods())


def test_records_of_kernels_make_chapters_on_speed_and_memory(tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "benchmarks/results/h100"
    paths = [
        results / name
        for name in ("decode/grid.json", "decode/sink.json", "prefill/lengths.json", "e2e/llama-3.1-8b.json")
    ]
    found = speed.shapes(paths)
    newest = next(shape for shape in found if (shape.phase, shape.words) == ("decode", "1 x 131,072"))
    assert newest.record["path"].endswith("sink.json")  # it is in the grid too, which is older
    assert (newest.older, newest.name) == (False, "1 x 131,072")
    assert next(shape for shape in found if shape.words == "1 x 8,192").name == f"1 x 8,192{MARK}"
    rows = json.loads((results / "decode/sink.json").read_text())["rows"]
    times = [
        row["p50_us"]
        for row in rows
        if row["kind"] == "bf16" and row["status"] == "timed" and row["case"]["batch"] == 1
    ]
    assert newest.time("bf16") == min(times)
    assert newest.relative("thrift") == pytest.approx(newest.rows["thrift"]["p50_us"] / min(times))
    chapters = [speed.speed(paths), speed.memory(paths)]
    for chapter in chapters:
        assert chapter is not None
        for chart in chapter["charts"]:
            assert "thrift" in {trace.name for trace in chart.figure.data}
            for trace in chart.figure.data:
                assert trace.marker.color == COLOURS[trace.name]
    text = page.markdown([], paths)
    assert "| `1 x 131,072` | " in text
    assert f"{MARK} {OLDER}." in text
    assert "877,056 tokens of context fit" in text
    assert speed.speed([]) is None
    assert load_runs(paths) == []  # they are no runs


def test_points_beyond_the_edge_tell_their_values() -> None:
    series = charts.Series("paper", "#000000", [(0.1, -3.0), (0.2, 0.5)], [(-4.0, -2.0), (0.4, 0.7)])
    (trace,) = charts.lines(charts.Axis("x"), charts.Axis("y", (-0.5, 1.0), form=".2f"), [series]).data
    assert list(trace.y) == [-0.5, 0.5]
    assert list(trace.marker.symbol) == ["triangle-down", "circle"]
    assert trace.customdata[0][0] == "-3.00"
    assert trace.customdata[1][1] == "<br>[0.40, 0.70]"
    assert trace.error_y.array == pytest.approx((0, 0.2))


def test_markdown_has_the_figures_of_the_metrics(finished: tuple[Path, dict[str, Any]]) -> None:
    text = page.markdown([Run.load(finished[0])])
    rows = {row["method"]: row for row in finished[1]["nll"] if row["length"] == 200}
    assert f"| `fp4` | {rows['fp4']['nll']:.4f} | {rows['fp4']['loss']:+.4f} [" in text
    assert f"Uniform 4-bit attention costs {rows['fp4']['loss']:+.4f}" in text
    assert "### Where it loses" in text
    widths = {line.count("|") for line in text.split("### Tasks")[1].split("\n\n")[1].splitlines()}
    assert len(widths) == 1


def test_methods_are_kept_with_every_option() -> None:
    for method in parse_methods("fp16,fp4,paper,thrift:high=nested,quest,snapkv:keep=0.3"):
        assert from_description(method.name, json.loads(json.dumps(described(method)))) == method
    old = {key: value for key, value in FP4.to_dict().items() if key not in ("balance", "total")}
    assert from_description("fp4", old).config == FP4  # a record from before these options


def test_where_it_loses(finished: tuple[Path, dict[str, Any]]) -> None:
    loaded_run = Run.load(finished[0])
    metrics = json.loads(json.dumps(loaded_run.metrics))
    for row in metrics["nll"]:
        if row["method"] == "thrift:budget=0.3":
            row |= {"loss": 0.5, "loss_interval": [0.4, 0.6]}
        if row["method"] == "topk:budget=0.5":
            row |= {"loss": 0.1, "loss_interval": [0.05, 0.2]}
    for row in metrics["methods"]:
        if row["name"] == "topk:budget=0.5":
            row["prefill_cost"] = 0.2
    said = page.losses(replace(loaded_run, metrics=metrics))
    assert said[0] == "Above fp16 beyond noise, in nats per token: thrift:budget=0.3 +0.5000 [+0.4000, +0.6000]."
    assert (
        "topk:budget=0.5 is nearer to fp16 than thrift:budget=0.3 at no higher prefill cost (+0.1000, +0.5000)." in said
    )


def test_nll_records_join_the_runs_of_their_model(
    finished: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    methods = parse_methods("fp16,fp4,thrift:budget=0.3")
    result = evaluate(str(place / "model"), str(place / "text.txt"), methods, length=300, windows=2, device="cpu")
    record = tmp_path / "record.json"
    result.save(record)
    (alone,) = load_runs([record])
    rows = {row["method"]: row for row in alone.metrics["nll"]}
    for row in result.rows:  # the same blocks, the same resamples
        mine = rows[row.method.name]
        assert mine["nll"] == pytest.approx(row.nll, rel=1e-6)
        assert (
            mine["loss"] == pytest.approx(row.loss, rel=1e-4, abs=1e-7)
            if row.loss is not None
            else mine["loss"] is None
        )
        if row.loss_interval is not None:
            assert mine["loss_interval"] == pytest.approx(row.loss_interval, rel=1e-4, abs=1e-7)
    (both,) = load_runs([finished[0], record])
    assert both.longest == 300
    assert {row["task"] for row in both.tasks()} == {"longbench_lcc", "longbench_trec", "longbench", "all"}
    assert both.metrics["concentration"]
    assert "snapkv:keep=0.5" in both.methods()
    assert "longbench_lcc*" in page.markdown([both])
    other = json.loads(record.read_text())
    other["model"]["spec"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert len(load_runs([record, tmp_path / "other.json"])) == 2
    with pytest.raises(ValueError, match="records of one model expected"):
        Run.of_records([record, tmp_path / "other.json"])
    with pytest.raises(ValueError, match="is not a record of kind nll"):
        load_runs([finished[0] / "metrics.json"])


def test_folders_that_are_no_run(tmp_path: Path, place: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run of `thrift eval suite`"):
        Run.load(tmp_path)
    Folder(tmp_path).begin(a_plan(place))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["computed"]["fp16"] is None
    assert config["computed"]["snapkv:keep=0.5"] == {"keep": 0.5}
    config["computed"]["thrift:budget=0.3"]["budget"] = "0.2"  # as if the default had been another one then
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds a run of another plan"):
        Folder(tmp_path).begin(a_plan(place))
    with pytest.raises(ValueError, match="holds no results yet"):
        Run.load(tmp_path)
    (tmp_path / "config.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="holds a run of schema 0, expected 1"):
        Run.load(tmp_path)


def test_commands(place: Path, tmp_path: Path) -> None:
    def thrift(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, ["eval", *arguments], env={"COLUMNS": "200"})

    folder = tmp_path / "run"
    options = (
        "--model",
        str(place / "model"),
        "--texts",
        str(place / "text.txt"),
        "--nll-lengths",
        "130",
        "--tasks",
        "",
    )
    options += ("--lengths", "", "--concentration", "0", "--device", "cpu", "--methods", "fp16,fp4,thrift:budget=0.3")
    result = thrift("suite", "-o", str(folder), *options, "--baselines", "thrift:budget=0.3")
    assert result.exit_code == 0, result.output
    assert "Uniform 4-bit attention costs" in result.output
    assert (folder / "report.html").is_file()
    assert json.loads((folder / "config.json").read_text())["methods"].count(",") == 6
    assert thrift("report", str(folder), "--markdown", str(tmp_path / "r.md")).exit_code == 0
    assert "### NLL, 130 tokens" in (tmp_path / "r.md").read_text()
    for arguments, message in (
        (("suite", "-o", str(folder), "--preset", "huge"), "'huge' is not one of 'quick', 'full'"),
        (("suite", "-o", str(tmp_path / "x"), "--nll-lengths", "many"), "expected whole numbers"),
        (("report", str(tmp_path / "gone")), "holds no run"),
    ):
        result = thrift(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------


def test_the_harness_gets_the_model_with_the_method_inside(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Wrapped:
        def __init__(self, **options: Any):
            seen.update(options)

    def simple_evaluate(model: Wrapped, tasks: list[str], limit: int | None, **options: Any) -> dict[str, Any]:
        assert isinstance(model, Wrapped)
        seen.update(tasks=tasks, limit=limit, implementation=seen["pretrained"].config._attn_implementation, **options)
        with torch.no_grad():
            seen["pretrained"](torch.arange(100)[None])
        return {"results": {"lambada": {"acc": 0.5}}, "samples": []}

    modules = {
        "lm_eval": SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=Wrapped),
    }
    monkeypatch.setattr(harness, "need", lambda name, extra: modules[name])
    found = harness.evaluate(tiny, parse_method("thrift:budget=1"), ["lambada"], limit=3, num_fewshot=0)
    assert found == {"results": {"lambada": {"acc": 0.5}}, "share": 1.0, "unserved": []}
    assert seen["implementation"] == "thrift"
    assert (seen["tasks"], seen["limit"], seen["num_fewshot"], seen["batch_size"]) == (["lambada"], 3, 0, 1)
    assert seen["tokenizer"] is tiny.tokenizer
    assert tiny.model.config._attn_implementation == "sdpa"
    with pytest.raises(NotImplementedError, match="needs prompt and answer apart"):
        harness.evaluate(tiny, parse_method("snapkv"), ["lambada"])


def test_the_harness_is_optional(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, extra: str) -> None:
        raise MissingExtra(f"pip install 'thrift-attn[{extra}]'")

    monkeypatch.setattr(harness, "need", refuse)
    with pytest.raises(MissingExtra, match=r"thrift-attn\[harness\]"):
        harness.evaluate(tiny, parse_method("thrift"), ["lambada"])


def test_the_real_harness_reads_the_model(tiny: Loaded) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=1)
    request = Instance(request_type="loglikelihood", doc={}, arguments=("The 3th house on", " the hill"), idx=0)
    (plain, _), *_ = wrapped.loglikelihood([request], disable_tqdm=True)
    from thrift_lab.eval.apply import applied

    with applied(tiny.model, parse_method("thrift:budget=1")):
        (full_budget, _), *_ = wrapped.loglikelihood([request], disable_tqdm=True)
    assert full_budget == pytest.approx(plain, rel=1e-3)
