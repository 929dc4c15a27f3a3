"""The paper's tables as plans."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from support.tiny_eval import save_model
from thrift_lab.cli import app
from thrift_lab.console import FetchError
from thrift_lab.eval import reproduce as plans
from thrift_lab.eval.cost import costs
from thrift_lab.eval.methods import parse_methods
from thrift_lab.eval.paper_tables import MODELS, TABLES
from thrift_lab.eval.suite_folder import Folder
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads 2,048 tokens, and a text for stand-ins."""
    folder = tmp_path_factory.mktemp("reproduce")
    config = LlamaConfig.from_pretrained(save_model(folder / "model"))
    config.update({"max_position_embeddings": 4096, "head_dim": 32})  # KIVI has groups of 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    lines = (
        f"The {n}th house on the hill has {n * n} windows and {n + 3} doors, says the man of house {n % 7}.\n"
        for n in range(900)
    )
    (folder / "houses.txt").write_text("".join(lines))
    return folder


def test_the_list_says_what_each_takes_before_it_starts() -> None:
    done = CliRunner().invoke(app, ["reproduce", "--list"])
    assert done.exit_code == 0
    for name in TABLES:
        assert re.search(rf"^{name} .*: \d+\.\d h and \d+ GB on one H100, three models$", done.output, re.M)
    assert "thrift bench prefill --preset full" in done.output
    for _, _, takes in plans.listed():
        assert takes.gigabytes < 80
    small, large = (plans.estimate(TABLES[name].stages(None)[0]) for name in ("concentration", "nll"))
    assert small.hours < large.hours


def test_every_model_is_pinned_and_every_plan_can_be_made() -> None:
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", model.spec) for model in MODELS)
    made = plans.plans()
    assert len(made) == len(TABLES) * len(MODELS)
    for plan in made.values():
        methods = parse_methods(plan.methods)
        assert methods[0].plain
    (thrift,) = parse_methods("thrift")
    for spec in ("quest:budget=0.295", "topk:budget=0.295"):  # the budget at which they cost what thrift costs
        (sparse,) = parse_methods(spec)
        assert costs(sparse, None).prefill == pytest.approx(costs(thrift, None).prefill, abs=1e-3)


@pytest.mark.parametrize("name", list(TABLES))
def test_every_plan_runs_offline(name: str, place: Path, tmp_path: Path) -> None:
    length = 900 if TABLES[name].tasks else 140
    options = [
        "--offline",
        "--model",
        str(place / "model"),
        "--text",
        str(place / "houses.txt"),
        "--length",
        str(length),
    ]
    options += ["--device", "cpu", "-o", str(tmp_path)]
    done = CliRunner().invoke(app, ["reproduce", name, *options])
    assert done.exit_code == 0, done.output
    said = (tmp_path / name / "table.md").read_text()
    assert "Not comparable with the paper." in said
    assert said.count("| offline |") == said.count(f"| {length:,} |") > 0
    if name == "average":
        assert "mean score 0.452 (average over RULER" in said
        assert "recovered share 0.891 (abstract)" in said
    else:
        assert "not at hand" in said
    records = Folder(tmp_path / name / "offline").records()
    if name == "concentration":  # the quickest: started again, nothing is run again
        assert CliRunner().invoke(app, ["reproduce", name, *options]).exit_code == 0
        assert Folder(tmp_path / name / "offline").records() == records


def test_what_is_refused() -> None:
    for words, message in (
        ([], "which table? There are nll, concentration"),
        (["tea"], "no table 'tea': there are nll"),
        (["nll", "--only", "gpt"], "--only must be one of llama-3.1-8b, qwen3-8b, ministral-8b, got 'gpt'"),
        (["--fetch", "ruler"], "--fetch needs --data"),
    ):
        done = CliRunner().invoke(app, ["reproduce", *words])
        assert done.exit_code != 0
        assert message in " ".join(done.output.split())


def test_published_files_are_brought_once_and_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = io.BytesIO()
    with zipfile.ZipFile(pack, "w") as files:
        for name in ("data/trec.jsonl", "data/trec_e.jsonl"):
            files.writestr(name, "{}\n")
    (tmp_path / "data.zip").write_bytes(pack.getvalue())
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as tar:
        for name in (
            "nq-dev-multikilt_1000_k20_dep6",
            "nq-dev-multikilt_1000_k440_dep6",
            "nq-train-multikilt_1000_k3_dep6",
        ):
            entry = tarfile.TarInfo(f"data/kilt/{name}.jsonl")
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    asked: list[str] = []

    def from_hub(repo: str, commit: str, file: str) -> str:
        asked.append(f"{repo}@{commit}")
        return str(tmp_path / file)

    monkeypatch.setattr(plans, "_from_hub", from_hub)
    data = plans.fetch(tmp_path / "files", ("longbench", "helmet"))
    assert sorted(p.relative_to(data).as_posix() for p in data.rglob("*.jsonl")) == [
        "helmet/nq.jsonl", "helmet/nq_demos.jsonl", "longbench/trec.jsonl",
    ]  # fmt: skip
    assert (data / "helmet/nq.jsonl").read_text().endswith("k440_dep6")
    assert asked == ["THUDM/LongBench@4a90f81c8db79f60c15f77dcd207a1099038c775", "princeton-nlp/HELMET@c5b85e7"]
    plans.fetch(data, ("longbench", "helmet"))
    assert len(asked) == 2
    (data / "longbench/trec.jsonl").write_text("other")
    with pytest.raises(
        FetchError, match=r"longbench/trec.jsonl is not the file that was fetched first: expected sha256"
    ):
        plans.fetch(data, ())
    assert plans.helmet_file("data/json_kv/test_k900_dep6.jsonl") is None
