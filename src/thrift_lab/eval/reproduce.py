"""``thrift reproduce``: a plan for each table and figure of the paper, from the estimate to the table beside the paper's.

A plan is runs of `thrift_lab.eval.suite`, each in a folder of its own: killed and started again they go on where they stopped,
and exact answers are computed once. Latency is timed by `thrift bench`, which has a check of its numbers of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from thrift_lab.console import FetchError, Log, Progress, silent, unseen
from thrift_lab.eval.methods import Method, parse_methods
from thrift_lab.eval.paper_tables import TABLES, PaperModel, PaperTable, Stage
from thrift_lab.eval.suite import run
from thrift_lab.eval.suite_folder import SuitePlan
from thrift_lab.extras import need
from thrift_lab.sheet import Sheet

LATENCY = (
    "thrift bench prefill --preset full -o bench/prefill",
    "thrift bench decode --preset full -o bench/decode",
    "thrift bench e2e -o bench/e2e",
)
"""Commands of the paper's latency figures."""

_DENSE, _KERNEL, _PLAIN = 4e14, 2e14, 1.5e13
"""Operations a second of one H100 that estimates go by: weights, attention kernels, attention in plain PyTorch."""

_TOKEN = 0.04
"""Seconds of a greedy token."""


class Estimate(NamedTuple):
    """What a run takes on one H100 80GB: hours of computing and GB of memory; downloads are not in it."""

    hours: float
    gigabytes: float


def estimate(stage: Stage) -> Estimate:
    """Hours and memory of a stage, good to a factor of two.

    Raises:
        ValueError: a stage without a model of known size.
    """
    model, plan = stage.model, stage.plan
    if model is None:
        raise ValueError(f"stage {stage.name!r} has no model of known size")
    methods = parse_methods(plan.methods)
    seconds = 0.0
    for method in methods:
        seconds += sum(plan.windows * len(plan.texts) * _reading(model, method, length) for length in plan.nll_lengths)
        tasks = {"ruler": 13, "helmet": 6, "longbench": 16, "all": 35}.get(plan.tasks, 1) if plan.tasks else 0
        answers = plan.samples * tasks
        seconds += sum(answers * (_reading(model, method, length) + 64 * _TOKEN) for length in plan.lengths)
    longest = max((*plan.nll_lengths, *plan.lengths, plan.concentration))
    cache = 4 * longest * model.layers * model.kv_heads * model.head_dim / 1e9
    return Estimate(seconds / 3600, 2 * model.parameters + 2 * cache + 6)


def _reading(model: PaperModel, method: Method, tokens: int) -> float:
    """Seconds in which a method reads so many tokens."""
    attention = 2 * tokens**2 * model.heads * model.head_dim * model.layers
    plain = method.rival is not None or (method.config is not None and method.config.score != "mean")
    return 2e9 * model.parameters * tokens / _DENSE + attention / (_PLAIN if plain else _KERNEL)


def listed() -> list[tuple[str, str, Estimate]]:
    """Every plan: name, what it shows, and what all of its runs take; the memory is that of the largest."""
    rows = []
    for table in TABLES.values():
        found = [estimate(stage) for stage in table.stages(None)]
        rows.append((table.name, table.about, Estimate(sum(e.hours for e in found), max(e.gigabytes for e in found))))
    return rows


def reproduce(
    table: PaperTable,
    stages: Sequence[Stage],
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    log: Log = silent,
    progress: Progress = unseen,
) -> str:
    """Run what is not done yet, and return the table beside the paper's figures.

    Args:
        table: which.
        stages: of `PaperTable.stages` or `PaperTable.offline`.
        folder: of all its runs.
        device: see `thrift_lab.models.load_model`.
        dtype: likewise.
        log: called with a line of text when something slow starts.
        progress: called before and after every sample and method.
    """
    metrics = {}
    for at, stage in enumerate(stages, start=1):
        log(f"{table.name}: {stage.name}, run {at} of {len(stages)}")
        metrics[stage.name] = run(
            stage.plan, folder / stage.name, device=device, dtype=dtype, log=log, progress=progress
        )
    return beside(table, metrics, offline=all(stage.model is None for stage in stages))


def beside(table: PaperTable, metrics: dict[str, dict[str, Any]], *, offline: bool = False) -> str:
    """Markdown: what was measured, a row for each method, and what the paper says of it."""
    lines = [f"# {table.name}: {table.about}", ""]
    if offline:
        lines += [
            "Offline: a small model, one text and stand-ins for published files. Not comparable with the paper.",
            "",
        ]
    rows = []
    for name, found in metrics.items():
        alone = len({row["text"] for row in found["nll"]}) == 1
        rows += [
            _row(table, name, row, f"{row['nll']:.4f} nats", row["loss"], row["recovered"])
            for row in found["nll"]
            if row["text"] == "all" or alone
        ]
        for row in found["tasks"]:
            if row["group"] and row["task"] == "all":
                score = f"score {row['score']:.3f}, n = {row['samples']}"
                rows.append(_row(table, name, row, score, row["difference"], row["gold_recovered"]))
        for row in found["concentration"]:
            at = row["shares"].index(0.05)
            held = f"{row['error_share'][at]:.1%} of the error in 5% of the blocks"
            rows.append((name, f"{row['length']:,}", "`fp4`", held, "-", "-", "not at hand"))
    head = ("run", "length", "method", "measured", "from exact", "recovered", "the paper")
    lines.append(Sheet(head, rows).markdown())
    if not table.published:
        lines += ["", "The figures of this table are not in the paper's abstract or its authors' README: not at hand."]
    return "\n".join(lines) + "\n"


def _row(
    table: PaperTable, run: str, row: dict[str, Any], said: str, gap: float | None, back: float | None
) -> tuple[str, ...]:
    """One line of `beside`."""
    figures = [p for p in table.published if p.method == row["method"] and p.value is not None]
    paper = "; ".join(f"{p.what} {p.value:g} ({p.where})" for p in figures) or "not at hand"
    return (
        run, f"{row['length']:,}", f"`{row['method']}`", said, "-" if gap is None else f"{gap:+.4f}",
        "-" if back is None else f"{back:.1%}", paper,
    )  # fmt: skip


# -- published files --------------------------------------------------------------------------------------------------

FILES = {
    "ruler/squad.json": "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
    "ruler/hotpot.json": "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json",
}
"""Files of RULER's questions, at their authors' addresses."""

ARCHIVES = {
    "longbench": ("THUDM/LongBench", "4a90f81c8db79f60c15f77dcd207a1099038c775", "data.zip"),
    "helmet": ("princeton-nlp/HELMET", "c5b85e7", "data.tar.gz"),
}
"""Archives of the hub: repository, commit (HELMET's is known by its first 7 digits), file; 0.1 and 11 GB."""


def fetch(folder: Path, wanted: Sequence[str] = ("ruler", "longbench", "helmet"), log: Log = silent) -> Path:
    """Bring the published files into a folder that ``--data`` takes; what is there already stays.

    The sha256 of every file is kept in ``sources.json``: a file that has changed since is refused.

    Raises:
        FetchError: something cannot be had, or is not what it was.
        MissingExtra: pooch or huggingface_hub is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen = folder / "sources.json"
    known: dict[str, str] = json.loads(seen.read_text()) if seen.exists() else {}
    pooch = need("pooch")
    for name, url in FILES.items():
        if name.partition("/")[0] in wanted and not (folder / name).exists():
            log(f"fetching {url}")
            try:
                pooch.retrieve(url, known.get(name), fname=Path(name).name, path=folder / Path(name).parent)
            except (OSError, ValueError) as error:
                raise FetchError(f"could not fetch {name}: {error}") from error
    for kind, (repo, commit, file) in ARCHIVES.items():
        if kind in wanted and not (folder / kind).exists():
            log(f"fetching {file} of {repo}")
            _unpack(Path(_from_hub(repo, commit, file)), folder, kind)
    for path in sorted(folder.rglob("*.json*")):
        name = path.relative_to(folder).as_posix()
        if name == seen.name:
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if known.setdefault(name, digest) != digest:
            raise FetchError(
                f"{name} is not the file that was fetched first: expected sha256 {known[name]}, got {digest}"
            )
    seen.write_text(json.dumps(known, indent=1) + "\n")
    return folder


def _from_hub(repo: str, commit: str, file: str) -> str:
    """A file of a dataset at a commit, which may be given by its first digits."""
    hub = need("huggingface_hub", "hf")
    try:
        if len(commit) < 40:
            whole = hub.HfApi().dataset_info(repo).sha
            if not whole.startswith(commit):
                raise FetchError(f"{repo} is at commit {whole}, expected {commit}...")
            commit = whole
        return hub.hf_hub_download(repo, file, repo_type="dataset", revision=commit)
    except FetchError:
        raise
    except Exception as error:  # the hub client has no common base class for offline, missing and gated
        raise FetchError(f"could not fetch {file} of {repo}: {type(error).__name__}: {error}") from error


def _unpack(archive: Path, folder: Path, kind: str) -> None:
    """Put the ``.jsonl`` files of an archive into a folder of their kind."""
    target = folder / kind
    target.mkdir()
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as files:
            for name in files.namelist():
                if name.endswith(".jsonl") and not name.endswith("_e.jsonl"):
                    (target / Path(name).name).write_bytes(files.read(name))
        return
    largest: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            found = helmet_file(member.name) if member.isfile() else None
            if found is None or largest.get(found[0], -1) >= found[1]:
                continue
            largest[found[0]] = found[1]
            content = tar.extractfile(member)
            assert content is not None
            (target / found[0]).write_bytes(content.read())


def helmet_file(member: str) -> tuple[str, int] | None:
    """What a member of HELMET's archive is here, and its number of passages, of which the largest file is taken.

    ``data/kilt/nq-dev-multikilt_1000_k440_dep6.jsonl`` is ``nq.jsonl``, the same with ``k3`` (the examples) ``nq_demos.jsonl``.
    None for a file that no task reads.
    """
    found = re.fullmatch(r".*/kilt/(nq|triviaqa|hotpotqa|popqa)[-_].*_k(\d+)_.*\.jsonl", member)
    if found is None:
        return None
    passages = int(found[2])
    return f"{found[1]}{'_demos' * (passages == 3)}.jsonl", passages


def plans() -> dict[str, SuitePlan]:
    """Every run of every table, by its place, for tests and lists."""
    return {f"{table.name}/{stage.name}": stage.plan for table in TABLES.values() for stage in table.stages(None)}
