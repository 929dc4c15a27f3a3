"""What the commands share: options, what they print while they run and when they fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

Model = Annotated[str, typer.Option(help="Name, local folder, .gguf file or hub id.")]
TextSource = Annotated[str, typer.Option(help="File, shakespeare[:PLAY], pg19 or hub:OWNER/NAME[:SPLIT[:COLUMN]].")]
Promoted = Annotated[str, typer.Option(help="Blocks in high precision: 0.05, 5%, top_k(8) or paper.")]
Storage = Annotated[str, typer.Option(help="How they are stored: nested, nested8 or 16bit.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


@contextmanager
def errors() -> Iterator[None]:
    """Known errors become one line on stderr and exit code 2; others keep their traceback."""
    from thrift_lab.eval.fetch import FetchError

    try:
        yield
    except (ValueError, NotImplementedError, OSError, ImportError, FetchError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextmanager
def shown(console: Console) -> Iterator[Any]:
    """A progress line: first what is being loaded, then a bar over windows, methods and layers."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def notify(message: str) -> None:
            if message:
                bar.update(task, description=message)
            if message and not console.is_terminal:
                console.print(message, highlight=False)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield notify, progress
