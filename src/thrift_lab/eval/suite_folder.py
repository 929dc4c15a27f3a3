"""What a suite runs, and the folder it runs in: see `thrift_lab.eval.suite` for its files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thrift_lab.eval.methods import described, from_description, parse_methods
from thrift_lab.extras import need
from thrift_lab.provenance import write_json
from thrift_lab.records import read_json

SCHEMA = 1
STANDIN = "standin"
"""As ``data``: make stand-ins for the published files from the first text."""

Key = tuple[str, str, int, int, str]
"""Kind, task or text, length, index, method."""

KEYS = ("kind", "task", "length", "index", "method")


@dataclass(frozen=True)
class SuitePlan:
    """What a suite runs.

    Args:
        model: see `thrift_lab.models.load_model`.
        methods: comma-separated specs; ``fp16`` and ``fp4`` among them give losses and recovered shares.
        texts: for NLL, see `thrift_lab.eval.texts.load_text`; the first is also RULER's haystack.
        nll_lengths: tokens of a window.
        windows: of each text and length.
        tasks: names or families, see `thrift_lab.eval.tasks.table`; empty for none.
        lengths: most tokens of a sample, the answer included.
        samples: of each task and length.
        max_new: most tokens of an answer; None for what each task says.
        chat: use the tokenizer's chat template.
        data: folder with the published files, ``"standin"``, or None.
        hub: read LongBench from the hub.
        concentration: tokens for the measurement of error concentration, of the first text; 0 for none.
        concentrate_all: measure it on every text.
        seed: of the generated tasks.

    Raises:
        ValueError: nothing to run, or a number out of range.
    """

    model: str
    methods: str
    texts: tuple[str, ...] = ("shakespeare",)
    nll_lengths: tuple[int, ...] = ()
    windows: int = 1
    tasks: str = ""
    lengths: tuple[int, ...] = ()
    samples: int = 1
    max_new: int | None = None
    chat: bool = False
    data: str | None = None
    hub: bool = False
    concentration: int = 0
    concentrate_all: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("a plan needs at least one text")
        if not self.nll_lengths and not (self.tasks and self.lengths) and not self.concentration:
            raise ValueError(
                "nothing to run: give NLL lengths, tasks with lengths, or a length for error concentration"
            )
        for name in ("windows", "samples", "max_new"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if min((*self.nll_lengths, *self.lengths, 2)) < 2 or self.concentration < 0:
            raise ValueError("lengths must be at least 2 tokens, the one of error concentration 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return json.loads(json.dumps(asdict(self)))


class Folder:
    """The files of a run."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.lines = path / "predictions.jsonl"
        self.notes = path / "environment.jsonl"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing into the folder.

        Raises:
            ValueError: another run is at work in it.
        """
        filelock = need("filelock")
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ValueError(f"another run is at work in {self.path}: wait for it, or give another folder") from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, plan: SuitePlan) -> None:
        """Make the folder, or check that it belongs to this plan.

        Raises:
            ValueError: it holds a run of another plan, or a config.json that is damaged.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        computed = {method.name: described(method) for method in parse_methods(plan.methods)}
        asked = {"schema": SCHEMA, **plan.to_dict(), "computed": computed}
        if self.config.exists():
            held = self._config()
            held = {"concentrate_all": False, **held}  # older folders do not know it
            different = [key for key in {**held, **asked} if held.get(key) != asked.get(key)]
            if different:
                what = "; ".join(f"{key}: there {held.get(key)!r}, asked {asked.get(key)!r}" for key in different)
                raise ValueError(f"{self.path} holds a run of another plan ({what}): give another folder")
        else:
            write_json(self.config, asked, allow_nan=False)
        for path in (self.lines, self.notes):  # a kill can leave half a line
            if path.exists():
                content = path.read_bytes()
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    with path.open("r+b") as file:
                        file.truncate(whole)

    def _config(self) -> dict[str, Any]:
        """Return the plan of the folder, with today's names of options."""
        config = read_json(self.config)
        if not isinstance(config, dict) or config.get("schema") != SCHEMA:
            got = config.get("schema") if isinstance(config, dict) else config
            raise ValueError(f"{self.path} holds a run of schema {got}, expected {SCHEMA}")
        try:
            methods = {name: from_description(name, options) for name, options in config["computed"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.config} is damaged: {type(error).__name__}: {error}") from error
        return {**config, "computed": {name: described(method) for name, method in methods.items()}}

    def records(self) -> list[dict[str, Any]]:
        """Return all lines.

        Raises:
            ValueError: a line that is damaged, or two about the same sample and method: two runs wrote at once.
        """
        lines = _json_lines(self.lines)
        for number, line in enumerate(lines, start=1):
            if lacking := [key for key in KEYS if key not in line]:
                raise ValueError(f"{self.lines}, line {number}: no {lacking[0]!r} in it; {_REMEDY}")
        if len({key_of(line) for line in lines}) < len(lines):
            raise ValueError(f"{self.lines} has two lines about one sample and method: did two runs write at once?")
        return lines

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns."""
        _append(self.lines, json.dumps(record, allow_nan=False))

    def note(self, environment: dict[str, Any]) -> None:
        """Add a line to the environment file."""
        _append(self.notes, json.dumps(environment))

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
        """Return plan, environments and records.

        Raises:
            FileNotFoundError: no run there.
            ValueError: a run of another schema, or a file that is damaged.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} holds no run of `thrift eval suite`: no config.json")
        return self._config(), _json_lines(self.notes), self.records()


_REMEDY = "delete it, and a new start makes it again"


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file as objects; half a line at its end, left by a kill, does not count."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    *whole, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); {_REMEDY}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: expected an object; {_REMEDY}")
        found.append(value)
    return found


def _append(path: Path, line: str) -> None:
    with path.open("ab") as file:
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def key_of(record: dict[str, Any]) -> Key:
    """What a line is about."""
    return record["kind"], record["task"], record["length"], record["index"], record["method"]
