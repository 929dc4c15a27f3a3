"""Which cells ``thrift bench serve`` times, on which model, with which options."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from thrift_lab.serving.engine_jobs import METHODS, EngineJob, MethodName, Task, check_methods, engine_options
from thrift_lab.serving.serve_records import PARTS, Cell, Part


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """What to run.

    Args:
        model: a name of `thrift_lab.bench.e2e_model.SHAPES`, whose weights are made up, or a folder.
        out: the record's file.
        methods: what is compared; the first is what others are compared with.
        lengths: tokens of a sequence when it ends.
        rounds: engines of each method, one method after the other, then again.
        steps: timed steps of one sequence.
        full_steps: timed steps of as many as fit.
        repeats: timed prompts of one sequence.
        chunk: tokens of a step.
        sequences: most sequences at once.
        memory: share of a GPU's memory that an engine may take.
        ranks: GPUs of an engine.
        dtype: of weights and of K and V.
        thrift: options of its section of the additional configuration.
        engine: further options of ``vllm.LLM``, for all methods.
        on_cpu: whether vLLM's CPU engine is meant.
        seconds: that an engine may take to start, or for one cell.
        seed: of random token ids.
    """

    model: str = "llama-3.1-8b"
    out: Path = Path("bench/serve.json")
    methods: tuple[MethodName, ...] = tuple(METHODS)
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    rounds: int = 1
    steps: int = 64
    full_steps: int = 32
    repeats: int = 2
    chunk: int = 8192
    sequences: int = 256
    memory: float = 0.9
    ranks: int = 1
    dtype: str = "bfloat16"
    thrift: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    on_cpu: bool = False
    seconds: float = 900.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_methods(self.methods)
        if not self.methods or not self.lengths:
            raise ValueError("expected at least one method and one length")
        least = max(self.steps, self.full_steps) + 1
        if short := [length for length in self.lengths if length <= least]:
            raise ValueError(f"lengths must be above the timed steps, {least - 1}, got {short[0]}")

    @property
    def settings(self) -> dict[str, Any]:
        """What must agree between calls that fill one record."""
        names = (
            "model", "methods", "lengths", "rounds", "steps", "full_steps", "repeats", "chunk", "sequences", "memory",
            "ranks", "dtype", "thrift", "engine", "on_cpu", "seed",
        )  # fmt: skip
        return {name: list(x) if isinstance(x := getattr(self, name), tuple) else x for name in names}

    @property
    def log(self) -> Path:
        """Where engines write."""
        return self.out.with_suffix(".log")

    def cells(self, only: Iterable[str] = ()) -> list[Cell]:
        """All cells in order, or those that one of some selections names.

        Args:
            only: ``METHOD``, ``METHOD/LENGTH`` or ``METHOD/LENGTH/PART``; an empty word or ``*`` stands for all.

        Raises:
            ValueError: a selection of nothing.
        """
        every = [
            Cell(method, length, part, number)
            for number in range(self.rounds)
            for method in self.methods
            for length in self.lengths
            for part in PARTS
        ]
        chosen: set[Cell] = set()
        for word in only:
            found = {cell for cell in every if _names(word, cell)}
            if not found:
                raise ValueError(
                    f"no cell {word!r}: METHOD/LENGTH/PART, of {', '.join(self.methods)}, "
                    f"{', '.join(map(str, self.lengths))} and {', '.join(PARTS)}"
                )
            chosen |= found
        return [cell for cell in every if cell in chosen] if chosen else every

    def job(self, method: MethodName, model: str, tasks: list[Task], **options: Any) -> EngineJob:
        """An engine of a method.

        Args:
            method: whose pages.
            model: folder of the model.
            tasks: what it is to do.
            **options: of ``vllm.LLM``, before those of the plan.
        """
        common = engine_options(
            dtype=self.dtype, tokens=max(self.lengths), sequences=self.sequences, chunk=self.chunk,
            memory=self.memory, ranks=self.ranks,
        )  # fmt: skip
        common["disable_log_stats"] = False  # the engine's metrics are read
        return EngineJob(
            method=method, model=model, on_cpu=self.on_cpu, tasks=tasks, thrift=self.thrift,
            options={**common, **options, **self.engine},
        )  # fmt: skip

    def task(self, cell: Cell) -> Task:
        """What an engine does for a cell."""
        steps: dict[Part, int] = {"single": self.steps, "capacity": self.full_steps}
        seed = self.seed + 1000 * cell.round
        return Task(do=cell.part, length=cell.length, steps=steps[cell.part], repeats=self.repeats, seed=seed)


def _names(word: str, cell: Cell) -> bool:
    """Whether a selection names a cell."""
    parts = [part.strip() for part in word.split("/")]
    told = (cell.method, str(cell.length), cell.part)
    return len(parts) <= len(told) and all(part in ("", "*", one) for part, one in zip(parts, told, strict=False))


SMALL = ServePlan(
    model="tiny",
    lengths=(256, 512),
    steps=6,
    full_steps=4,
    repeats=1,
    chunk=256,
    sequences=32,
    dtype="float16",
    engine={"enforce_eager": True, "kv_cache_memory_bytes": 4 << 20},
    on_cpu=True,
    seconds=300,
)
"""On vLLM's CPU engine: what the command does, not how fast."""


def plan_of(preset: str, **given: Any) -> ServePlan:
    """Return the plan of a preset with what was asked for.

    Args:
        preset: ``"full"`` or ``"small"``.
        **given: what differs; None where nothing was asked.
    """
    base = {"full": ServePlan(), "small": SMALL}[preset]
    return replace(base, **{name: value for name, value in given.items() if value is not None})
