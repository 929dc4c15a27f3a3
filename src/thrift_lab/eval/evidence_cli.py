"""``thrift eval frontier``, ``kinds`` and ``power``: commands beside those of `thrift_lab.eval.eval_cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thrift_lab.console import errors


def register(app: typer.Typer) -> None:
    """Add the commands to ``thrift eval``."""
    app.command()(frontier)


def frontier(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of `thrift eval suite`, or records of `thrift eval nll`.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The chart.")] = Path("frontier.png"),
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here.")] = None,
) -> None:
    """Bytes per token and multiplications against nats above exact: what is on the frontier, and what beats the rest."""
    with errors():
        from thrift_lab.eval import frontier as chart
        from thrift_lab.eval.runs import load_runs
        from thrift_lab.provenance import write_files

        loaded = load_runs(runs)
        text = "\n".join(chart.markdown(run, chart.points_of(run)) for run in loaded)
        print(text, end="")
        if markdown is not None:
            write_files({markdown: text.encode()})
        print(f"wrote {chart.draw(loaded, out)}")
