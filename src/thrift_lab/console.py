"""What the commands share: options, what they print while they run and when they fail."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup


class FetchError(RuntimeError):
    """A file could not be fetched, or is not the file that was pinned."""


Log = Callable[[str], None]
"""Called with a line of text when something slow starts or ends."""

Progress = Callable[[str, int, int], None]
"""Called with what runs now, steps done and steps in all."""

Model = Annotated[str, typer.Option(help="Name, local folder, .gguf file or hub id.")]
TextSource = Annotated[
    str,
    typer.Option(
        help="File, shakespeare[:PLAY], handbook:LANGUAGE, source, made:KIND, pg19, or hub:OWNER/NAME, perhaps with @COMMIT "
        "and then with :SPLIT or :SPLIT:COLUMN."
    ),
]
BudgetText = Annotated[
    str, typer.Option("--budget", help="Blocks in high precision: 5%, max(5%, 16), top_k(8) or paper.")
]
Storage = Annotated[
    Literal["nested", "nested8", "16bit"],
    typer.Option(help="How promoted blocks are stored: the base and a 4-bit or an 8-bit residual, or a 16-bit copy."),
]
RecordFile = Annotated[Path | None, typer.Option("--out", "-o", help="Write the record here.")]
RunFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; an unfinished one goes on.")]
Workers = Annotated[
    int, typer.Option(help="Processes with a model each that share the samples, and the GPUs that there are.", min=1)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the model; auto: float32 on a CPU, else its own."),
]

OLD_NAMES = {
    "json": "out",
    "output": "out",
    "budgets": "budget",
    "promoted": "budget",
    "high": "promoted-storage",
    "low": "base-format",
    "math": "compute",
    "recipe": "config",
}
"""What options were called before each thing had one name in all commands. Accepted, and no longer shown."""


def old_names_too(**own: str) -> dict[str, Any]:
    """Return settings of a `typer.Typer` whose commands, and those below them, know options by their old names as well.

    Args:
        **own: old names that only these commands had, with ``_`` for ``-``, and today's.
    """
    names = OLD_NAMES | {old.replace("_", "-"): new for old, new in own.items()}
    return {"token_normalize_func": lambda given: names.get(given, given)}


def in_order(*names: str) -> type[TyperGroup]:
    """Return a group of commands whose help lists them so: the most used first.

    Args:
        names: of all its commands that are shown.
    """

    class Ordered(TyperGroup):
        order = names

        def list_commands(self, ctx: Any) -> list[str]:
            known = super().list_commands(ctx)
            return [name for name in names if name in known] + [name for name in known if name not in names]

    return Ordered


BEAT = 30.0
"""Seconds between two lines of progress where nobody moves a cursor."""


def silent(line: str) -> None:
    """Say nothing: a `Log` for those who do not watch."""


def unseen(what: str, done: int, total: int) -> None:
    """Show nothing: a `Progress` for those who do not watch."""


_COMMA = re.compile(r",(?![^(]*\))")
"""A comma outside of parentheses: ``max(5%, 16)`` is one word."""


def words(given: str | Iterable[str] | None) -> list[str]:
    """Return the values of an option that may be given several times and may hold commas; those in parentheses part nothing.

    Args:
        given: what the command line gave: one text, several, or nothing.
    """
    texts = [given] if isinstance(given, str) else given or ()
    return [word.strip() for text in texts for word in _COMMA.split(text) if word.strip()]


def numbers(given: str | Iterable[str] | None) -> tuple[int, ...]:
    """Return the whole numbers of such an option.

    Raises:
        ValueError: something else than whole numbers.
    """
    try:
        return tuple(map(int, words(given)))
    except ValueError as error:
        raise ValueError(f"expected whole numbers, got {', '.join(words(given))!r}") from error


def table_console(width: int = 118) -> Console:
    """Return where tables go; a pipe or a file gets the width that they need."""
    return Console() if sys.stdout.isatty() else Console(width=width)


def logging_to(console: Console) -> Log:
    """Return a `Log` that prints its lines as they are, dim."""
    return lambda line: console.print(line, style="dim", highlight=False, markup=False) if line else None


@contextmanager
def errors() -> Iterator[None]:
    """Turn known errors into one line on stderr and exit code 2; others keep their traceback."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError, ImportError, FetchError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


_NOISY = ("torch.utils._pytree", "torchao", "huggingface_hub", "httpx", "datasets", "fsspec", "filelock")
"""Loggers of packages that report their own affairs to whoever uses a model."""


def hush() -> None:
    """Keep other packages from printing: warnings of theirs, bars and retries; errors still come, as exceptions."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for package in ("torch", "torchao", "triton", "transformers", "huggingface_hub", "datasets", "gguf"):
        warnings.filterwarnings("ignore", module=rf"{package}\b")


@contextmanager
def shown(console: Console) -> Iterator[Any]:
    """Show progress: first what is being loaded, then windows, methods and layers.

    On a terminal it is one line with a bar; elsewhere a line when something starts and one every `BEAT` seconds.

    Yields:
        A `Log` and a `Progress`.
    """
    if not console.is_terminal:
        with _lines(console) as reports:
            yield reports
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn as Spinner

    columns = (Spinner(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def log(line: str) -> None:
            if line:
                bar.update(task, description=line)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield log, progress


def kept(console: Console, log: Log) -> Log:
    """Return the log of `shown` for lines that stay: on a terminal the next one would take their place."""
    return logging_to(console) if console.is_terminal else log


@contextmanager
def _lines(console: Console) -> Iterator[tuple[Log, Progress]]:
    """`shown` without a cursor."""
    began, over, now = time.monotonic(), threading.Event(), ["starting"]

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def log(line: str) -> None:
        if line:
            now[0] = line
            say(line)

    def progress(what: str, done: int, total: int) -> None:
        now[0] = f"{what}, {done} of {total}"

    def beat() -> None:
        while not over.wait(BEAT):
            say(f"{now[0]}, after {time.monotonic() - began:.0f} s")

    teller = threading.Thread(target=beat, daemon=True)
    teller.start()
    try:
        yield log, progress
    finally:
        over.set()
        teller.join()
