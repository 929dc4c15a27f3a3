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

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thrift_lab.console import Log, Progress, silent, unseen
from thrift_lab.eval.answer import answer, stop_tokens
from thrift_lab.eval.bootstrap import BOOTSTRAP_BLOCK
from thrift_lab.eval.concentration import SHARES, of_model
from thrift_lab.eval.methods import Method, parse_methods
from thrift_lab.eval.nll import chars_needed, check_head, check_length, run_window, windows_of
from thrift_lab.eval.run_nll import PACKAGES
from thrift_lab.eval.suite_folder import KEYS, STANDIN, Folder, Key, SuitePlan, key_of
from thrift_lab.eval.summary import summarise
from thrift_lab.eval.tasks import standin
from thrift_lab.eval.tasks.base import Encoder, Sample, Task
from thrift_lab.eval.tasks.table import table
from thrift_lab.eval.texts import load_text
from thrift_lab.models import Loaded, load_model
from thrift_lab.provenance import commit, device_name, machine, now, versions, write_json


@dataclass(frozen=True)
class _Item:
    """One sample or window, for every method."""

    kind: str  # nll, task, concentration
    name: str
    length: int
    index: int

    def keys(self, methods: list[Method]) -> list[tuple[Key, Method]]:
        """What has to be run."""
        if self.kind == "concentration":
            methods = [method for method in methods if method.plain][:1]
        elif self.kind == "nll":
            methods = [method for method in methods if method.evict is None and not method.cached]
        return [((self.kind, self.name, self.length, self.index, method.name), method) for method in methods]


@dataclass(frozen=True)
class _Loaded:
    """Everything that is loaded once."""

    loaded: Loaded
    encoder: Encoder
    methods: list[Method]
    tasks: dict[str, Task]
    windows: dict[tuple[str, int], torch.Tensor]
    stops: set[int]
    left_out: dict[str, str]


def run(
    plan: SuitePlan,
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    log: Log = silent,
    progress: Progress = unseen,
) -> dict[str, Any]:
    """Run what is not yet in the folder, then summarise.

    Args:
        plan: what to run.
        folder: of the run; made if need be.
        device: see `load_model`.
        dtype: see `load_model`.
        log: called with a line of text when something slow starts.
        progress: called before and after every sample and method.

    Returns:
        The metrics, as in ``metrics.json``.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, FetchError, MissingExtra: each says what was expected.
    """
    files = Folder(folder)
    with files.held():
        return _run(plan, files, device, dtype, log, progress)


def _run(plan: SuitePlan, files: Folder, device: str, dtype: str, log: Log, progress: Progress) -> dict[str, Any]:
    """Do what `run` says, with the folder held."""
    methods, folder = parse_methods(plan.methods), files.path
    files.begin(plan)
    done = {key_of(record) for record in files.records()}
    ready, items = _prepare(plan, folder, methods, device, dtype, log)
    files.note({**_environment(ready.loaded, plan), "left_out": ready.left_out})
    todo = [(item, [(key, m) for key, m in item.keys(methods) if key not in done]) for item in items]
    total = sum(len(item.keys(methods)) for item in items)
    finished = total - sum(len(left) for _, left in todo)
    log("")
    for item, left in todo:
        sample = ready.tasks[item.name].sample(item.index, item.length, ready.encoder) if item.kind == "task" else None
        for key, method in left:
            progress(f"{item.name} {item.length} #{item.index}: {method.name}", finished, total)
            head = dict(zip(KEYS, key, strict=True))
            files.append({**head, **_measure(ready, item, sample, method)})
            finished += 1
    progress("done", total, total)
    metrics = summarise(methods, files.records(), head_dim_of(ready.loaded.model))
    write_json(folder / "metrics.json", metrics, allow_nan=False)
    return metrics


def _prepare(
    plan: SuitePlan, folder: Path, methods: list[Method], device: str, dtype: str, log: Log
) -> tuple[_Loaded, list[_Item]]:
    """Load everything and list the work; what cannot run fails here, before the first sample."""
    longest = max((*plan.nll_lengths, plan.concentration, 2))
    texts = {spec: load_text(spec, chars_needed(longest, plan.windows), log).content for spec in plan.texts}
    tasks: list[Task] = []
    left_out: dict[str, str] = {}
    if plan.tasks:
        essay = texts[plan.texts[0]]
        data = None if plan.data is None else Path(plan.data)
        if plan.data == STANDIN:
            data = standin.write(folder / STANDIN, essay, rows=max(8, plan.samples), seed=plan.seed)
        known = table(essay, data, hub=plan.hub, seed=plan.seed)
        tasks, left_out = known.choose(plan.tasks), known.left_out(plan.tasks)
        for name, files in left_out.items():
            log(f"left out for want of data: {name} needs {files}")
    if plan.max_new is not None:
        cap = plan.max_new
        tasks = [_Capped(task, cap) for task in tasks]
    loaded = load_model(plan.model, device=device, dtype=dtype, log=log)
    encoder = Encoder(loaded.tokenizer, plan.chat)
    for length in (longest, *plan.lengths):
        check_length(loaded.model, length)
    log("making samples")
    looked_at = (plan.texts if plan.concentrate_all else plan.texts[:1]) if plan.concentration else ()
    items = [_Item("concentration", spec, plan.concentration, 0) for spec in looked_at]
    windows: dict[tuple[str, int], torch.Tensor] = {}
    for spec, content in texts.items():
        for length in plan.nll_lengths:
            windows[spec, length] = windows_of(loaded.tokenizer, content, length, plan.windows)
            items += [_Item("nll", spec, length, index) for index in range(plan.windows)]
    for spec in looked_at:
        window = windows_of(loaded.tokenizer, texts[spec], plan.concentration, 1)
        windows[f"concentration of {spec}", plan.concentration] = window
    if windows:
        check_head(loaded.model, next(iter(windows.values())))
    for length in plan.lengths:
        for task in tasks:
            for index in {0, plan.samples - 1}:
                task.sample(index, length, encoder)
        # Samples outside, tasks inside: a run that was cut short has seen all tasks.
        items += [_Item("task", task.name, length, index) for index in range(plan.samples) for task in tasks]
    stops = stop_tokens(loaded.model, loaded.tokenizer)
    return _Loaded(loaded, encoder, methods, {t.name: t for t in tasks}, windows, stops, left_out), items


@dataclass(frozen=True)
class _Capped:
    """A task with shorter answers."""

    task: Task
    cap: int

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def family(self) -> str:
        return self.task.family

    @property
    def metric(self) -> str:
        return self.task.metric

    def sample(self, index: int, length: int, encoder: Encoder) -> Sample:
        sample = self.task.sample(index, length, encoder)
        return replace(sample, max_new=min(sample.max_new, self.cap))

    def score(self, prediction: str, sample: Sample) -> float:
        return self.task.score(prediction, sample)


def _measure(ready: _Loaded, item: _Item, sample: Sample | None, method: Method) -> dict[str, Any]:
    """One sample and method, as the rest of its line."""
    model = ready.loaded.model
    if item.kind == "concentration":
        heads = of_model(model, ready.windows[f"concentration of {item.name}", item.length][0])
        return {"shares": SHARES, "heads": [_rounded(asdict(head)) for head in heads]}
    if sample is None:
        window = run_window(model, method, ready.windows[item.name, item.length][item.index])
        nll = window.nll.double().numpy()
        starts = np.arange(0, len(nll), BOOTSTRAP_BLOCK)
        return {
            "nll": float(nll.mean()),
            "sums": [round(float(x), 5) for x in np.add.reduceat(nll, starts)],
            "tokens": len(nll),
            "seconds": round(window.seconds, 4),
            **_spent(window.stats),
            "unserved": list(window.unserved),
        }
    task = ready.tasks[item.name]
    prompt, gold = ready.encoder.ids(sample), ready.encoder.gold_ids(sample)
    given = answer(model, method, prompt, gold, sample.max_new, ready.stops)
    prediction = ready.loaded.tokenizer.decode(given.tokens, skip_special_tokens=True)
    return {
        "family": task.family,
        "metric": task.metric,
        "score": task.score(prediction, sample),
        "gold_nll": given.gold_nll,
        "prediction": prediction,
        "references": list(sample.references),
        "prompt_tokens": len(prompt),
        "gold_tokens": len(gold),
        "prompt_sha256": hashlib.sha256((sample.prompt + sample.prefix).encode()).hexdigest()[:16],
        "seconds": round(given.seconds, 4),
        **_spent(given.stats),
        "unserved": list(given.unserved),
    }


def head_dim_of(model: Any) -> int:
    """Head dim of a model, from its configuration."""
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _spent(stats: Any) -> dict[str, float | None]:
    """What was promoted; nothing for the model's own attention."""
    if stats is None:
        return {"share": None, "high_mass": None}
    return {"share": round(stats.share, 6), "high_mass": round(stats.high_mass, 6)}


def _rounded(head: dict[str, Any]) -> dict[str, Any]:
    """Fewer digits."""

    def short(x: Any) -> Any:
        return float(f"{x:.5g}") if isinstance(x, float) else x

    return {
        key: [short(x) for x in value] if isinstance(value, (list, tuple)) else short(value)
        for key, value in head.items()
    }


def _environment(loaded: Loaded, plan: SuitePlan) -> dict[str, Any]:
    """Where and with what a run was started."""
    model = loaded.model
    config = model.config.get_text_config()
    keys = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")
    return {
        "started": now(),
        "commit": commit(),
        "device": device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "model": {
            "spec": plan.model,
            "gguf_sha256": loaded.sha256,
            "class": type(model).__name__,
            **{key: getattr(config, key, None) for key in keys},
            "head_dim": head_dim_of(model),
        },
        "machine": machine(),
        "versions": versions((*PACKAGES, "rouge", "wonderwords")),
    }
