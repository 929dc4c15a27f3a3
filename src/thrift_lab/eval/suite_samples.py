"""The samples of a suite, and what is measured on one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import Self

from thrift_lab.console import Log
from thrift_lab.eval.answer import answer, stop_tokens
from thrift_lab.eval.bootstrap import BOOTSTRAP_BLOCK
from thrift_lab.eval.concentration import SHARES, of_model
from thrift_lab.eval.methods import Method, parse_methods
from thrift_lab.eval.nll import chars_needed, check_head, check_length, run_window, windows_of
from thrift_lab.eval.run_nll import PACKAGES
from thrift_lab.eval.suite_folder import KEYS, STANDIN, Key, SuitePlan
from thrift_lab.eval.tasks import standin
from thrift_lab.eval.tasks.base import Encoder, Sample, Task
from thrift_lab.eval.tasks.table import table
from thrift_lab.eval.texts import load_text
from thrift_lab.models import Loaded, load_model
from thrift_lab.provenance import commit, device_name, machine, now, versions


@dataclass(frozen=True)
class Item:
    """One sample or window, for every method.

    Args:
        kind: ``"nll"``, ``"task"`` or ``"concentration"``.
        name: of the task or text.
        length: in tokens.
        index: of the sample or window.
    """

    kind: str
    name: str
    length: int
    index: int

    def keys(self, methods: list[Method]) -> list[Key]:
        """What has to be run."""
        if self.kind == "concentration":
            methods = [method for method in methods if method.plain][:1]
        elif self.kind == "nll":
            methods = [method for method in methods if method.evict is None and not method.cached]
        return [(self.kind, self.name, self.length, self.index, method.name) for method in methods]


@dataclass(frozen=True)
class Samples:
    """What a plan runs, before a model is loaded: the same in every process.

    Args:
        texts: their content by spec.
        tasks: by name.
        left_out: tasks without data, and what they need.
        items: in the order in which they run.
        looked_at: texts whose error concentration is measured.
    """

    texts: dict[str, str]
    tasks: dict[str, Task]
    left_out: dict[str, str]
    items: list[Item]
    looked_at: tuple[str, ...]

    @classmethod
    def of(cls, plan: SuitePlan, folder: Path, log: Log) -> Self:
        """Read the texts and the data of tasks, and list the work.

        Args:
            plan: of the suite.
            folder: of the run, for stand-ins of published files.
            log: is told of tasks that are left out.
        """
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
        looked_at = (plan.texts if plan.concentrate_all else plan.texts[:1]) if plan.concentration else ()
        items = [Item("concentration", spec, plan.concentration, 0) for spec in looked_at]
        items += [Item("nll", x, n, i) for x in texts for n in plan.nll_lengths for i in range(plan.windows)]
        # Samples outside, tasks inside: a run that was cut short has seen all tasks.
        items += [Item("task", x.name, n, i) for n in plan.lengths for i in range(plan.samples) for x in tasks]
        return cls(texts, {task.name: task for task in tasks}, left_out, items, looked_at)


@dataclass(frozen=True)
class Measurer:
    """A loaded model with all that a measurement needs.

    Args:
        plan: of the suite.
        samples: of the plan.
        loaded: the model.
        encoder: of its tokenizer.
        methods: by name.
        windows: token ids by text and length.
        stops: tokens that end an answer.
    """

    plan: SuitePlan
    samples: Samples
    loaded: Loaded
    encoder: Encoder
    methods: dict[str, Method]
    windows: dict[tuple[str, int], torch.Tensor]
    stops: set[int]

    @classmethod
    def of(cls, plan: SuitePlan, samples: Samples, device: str, dtype: str, log: Log) -> Self:
        """Load the model; what cannot run fails here, before the first sample."""
        loaded = load_model(plan.model, device=device, dtype=dtype, log=log)
        encoder = Encoder(loaded.tokenizer, plan.chat)
        longest = max((*plan.nll_lengths, plan.concentration, 2))
        for length in (longest, *plan.lengths):
            check_length(loaded.model, length)
        log("making samples")
        windows: dict[tuple[str, int], torch.Tensor] = {}
        for spec, content in samples.texts.items():
            for length in plan.nll_lengths:
                windows[spec, length] = windows_of(loaded.tokenizer, content, length, plan.windows)
        for spec in samples.looked_at:
            window = windows_of(loaded.tokenizer, samples.texts[spec], plan.concentration, 1)
            windows[f"concentration of {spec}", plan.concentration] = window
        if windows:
            check_head(loaded.model, next(iter(windows.values())))
        for length in plan.lengths:
            for task in samples.tasks.values():
                for index in {0, plan.samples - 1}:
                    task.sample(index, length, encoder)
        methods = {method.name: method for method in parse_methods(plan.methods)}
        stops = stop_tokens(loaded.model, loaded.tokenizer)
        return cls(plan, samples, loaded, encoder, methods, windows, stops)

    def lines(
        self, todo: Iterable[tuple[int, list[Key]]], begin: Callable[[Key], None] = lambda key: None
    ) -> Iterator[dict[str, Any]]:
        """Measure, one line at a time; before the first comes the environment.

        Args:
            todo: numbers of items, with what is still to be measured on each.
            begin: called before each measurement.
        """
        yield self.environment()
        for number, left in todo:
            item = self.samples.items[number]
            task = item.kind == "task"
            sample = self.samples.tasks[item.name].sample(item.index, item.length, self.encoder) if task else None
            for key in left:
                begin(key)
                yield {**dict(zip(KEYS, key, strict=True)), **self._measure(item, sample, self.methods[key[-1]])}

    def environment(self) -> dict[str, Any]:
        """Where and with what a run was started."""
        model = self.loaded.model
        config = model.config.get_text_config()
        keys = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "vocab_size")
        return {
            "started": now(),
            "commit": commit(),
            "device": device_name(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "model": {
                "spec": self.plan.model,
                "gguf_sha256": self.loaded.sha256,
                "class": type(model).__name__,
                **{key: getattr(config, key, None) for key in keys},
                "head_dim": head_dim_of(model),
            },
            "machine": machine(),
            "versions": versions((*PACKAGES, "rouge", "wonderwords")),
        }

    def _measure(self, item: Item, sample: Sample | None, method: Method) -> dict[str, Any]:
        """One sample and method, as the rest of its line."""
        model = self.loaded.model
        if item.kind == "concentration":
            heads = of_model(model, self.windows[f"concentration of {item.name}", item.length][0])
            return {"shares": SHARES, "heads": [_rounded(asdict(head)) for head in heads]}
        if sample is None:
            window = run_window(model, method, self.windows[item.name, item.length][item.index])
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
        task = self.samples.tasks[item.name]
        prompt, gold = self.encoder.ids(sample), self.encoder.gold_ids(sample)
        given = answer(model, method, prompt, gold, sample.max_new, self.stops)
        prediction = self.loaded.tokenizer.decode(given.tokens, skip_special_tokens=True)
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
