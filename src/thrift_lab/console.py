"""What the commands share: options, what they print while they run and when they fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console


class FetchError(RuntimeError):
    """A file could not be fetched, or is not the file that was pinned."""


Log = Callable[[str], None]
"""Called with a line of text when something slow starts or ends."""

Progress = Callable[[str, int, int], None]
"""Called with what runs now, steps done and steps in all."""

Model = Annotated[str, typer.Option(help="Name, local folder, .gguf file or hub id.")]
TextSource = Annotated[str, typer.Option(help="File, shakespeare[:PLAY], pg19 or hub:OWNER/NAME[:SPLIT[:COLUMN]].")]
Promoted = Annotated[str, typer.Option(help="Blocks in high precision: 5%, max(5%, 16), top_k(8) or paper.")]
Storage = Annotated[
    str, typer.Option("--promoted-storage", "--high", help="How they are stored: nested, nested8 or 16bit.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


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


@contextmanager
def shown(console: Console) -> Iterator[Any]:
    """Show a progress line: first what is being loaded, then a bar over windows, methods and layers.

    Yields:
        A `Log` and a `Progress`.
    """
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn as Spinner

    columns = (Spinner(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def log(line: str) -> None:
            if line:
                bar.update(task, description=line)
            if line and not console.is_terminal:
                console.print(line, highlight=False)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield log, progress
