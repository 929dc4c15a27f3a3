"""A whole evaluation: many tasks, many methods, one folder, and a run that can be killed and started again.

A folder holds

    config.json         what is run, with every option of every method; a second start must ask for the same
    environment.jsonl   one line per start: time, commit, versions, machine
    predictions.jsonl   one line per sample and method, appended when it is done
    metrics.json        means and intervals, see `thrift_lab.eval.summary`

A line is written in one piece and synced before the next sample begins; half a line, left by a kill, is cut off at the next
start. What has a line is never run again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thrift_lab.console import Log, Progress, silent, unseen
from thrift_lab.eval.methods import parse_methods
from thrift_lab.eval.suite_folder import Folder, Key, SuitePlan, key_of
from thrift_lab.eval.suite_samples import Measurer, Samples
from thrift_lab.eval.suite_workers import spread
from thrift_lab.eval.summary import summarise
from thrift_lab.provenance import write_json


def run(
    plan: SuitePlan,
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    workers: int = 1,
    log: Log = silent,
    progress: Progress = unseen,
) -> dict[str, Any]:
    """Run what is not yet in the folder, then summarise.

    Args:
        plan: what to run.
        folder: of the run; made if need be.
        device: see `load_model`.
        dtype: see `load_model`.
        workers: processes with a model each that share the samples, and the GPUs that there are.
        log: called with a line of text when something slow starts.
        progress: called before and after every sample and method.

    Returns:
        The metrics, as in ``metrics.json``.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, FetchError, MissingExtra: each says what was expected.
        RuntimeError: a worker was killed; what had been measured is kept.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    files = Folder(folder)
    with files.held():
        return _run(plan, files, device, dtype, workers, log, progress)


def _run(
    plan: SuitePlan, files: Folder, device: str, dtype: str, workers: int, log: Log, progress: Progress
) -> dict[str, Any]:
    """Do what `run` says, with the folder held."""
    methods = parse_methods(plan.methods)
    files.begin(plan)
    done = {key_of(line) for line in files.records()}
    samples = Samples.of(plan, files.path, log)
    keys = [[key for key in item.keys(methods) if key not in done] for item in samples.items]
    todo = [(number, left) for number, left in enumerate(keys) if left]
    finished, total = len(done), len(done) + sum(len(left) for _, left in todo)
    workers = min(workers, len(todo))
    if workers > 1:
        lines = spread(plan, files.path, todo, device, dtype, workers)
    else:
        measurer = Measurer.of(plan, samples, device, dtype, log)
        lines = measurer.lines(todo, lambda key: progress(_named(key), finished, total))
    environment = next(lines)
    files.note({**environment, "left_out": samples.left_out})
    log("")
    for line in lines:
        files.append(line)
        finished += 1
        progress(_named(key_of(line)), finished, total)
    progress("done", total, total)
    metrics = summarise(methods, files.records(), environment["model"]["head_dim"])
    write_json(files.path / "metrics.json", metrics, allow_nan=False)
    return metrics


def _named(key: Key) -> str:
    """A sample and its method, for the eye."""
    _, name, length, index, method = key
    return f"{name} {length} #{index}: {method}"
