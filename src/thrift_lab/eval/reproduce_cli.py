"""``thrift reproduce``: the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from thrift_lab.console import Device, Dtype, errors, shown, words

app = typer.Typer()
"""Its one command is one of ``thrift``, which takes it in."""


@app.command()
def reproduce(
    table: Annotated[str | None, typer.Argument(help="A name of --list.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs; unfinished ones go on.")] = Path(
        "reproduce"
    ),
    list_tables: Annotated[
        bool, typer.Option("--list", help="Tables and figures, with hours on one H100 and memory.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="A small model with stand-ins: does it run? Says nothing about the paper.")
    ] = False,
    fetch: Annotated[
        str | None, typer.Option(help="First bring published files into the folder of --data: ruler,longbench,helmet.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with published files (docs/evaluation.md).")] = None,
    only: Annotated[
        str | None, typer.Option(help="Only this model of the paper: llama-3.1-8b, qwen3-8b, ministral-8b.")
    ] = None,
    model: Annotated[str, typer.Option(help="Of an offline run.")] = "smollm2-135m",
    text: Annotated[str, typer.Option(help="Of an offline run.")] = "shakespeare",
    length: Annotated[int, typer.Option(help="Tokens of an offline run.")] = 1024,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Run a table or figure of the paper again, from pinned models and data, beside the paper's numbers.

    Started again it goes on where it stopped.
    """
    console = Console(soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    with errors():
        from thrift_lab.eval import reproduce as plans
        from thrift_lab.eval.paper_tables import TABLES
        from thrift_lab.provenance import write_files

        if list_tables:
            for name, about, takes in plans.listed():
                say(f"{name:<14} {about}: {takes.hours:.1f} h and {takes.gigabytes:.0f} GB on one H100, three models")
            say("latency        times of kernels and whole models on a GPU:")
            for command in plans.LATENCY:
                say(f"{'':<15}{command}")
            return
        if fetch is not None:
            if data is None:
                raise ValueError("--fetch needs --data, the folder to bring files into")
            plans.fetch(data, words(fetch), say)
        if table is None:
            if fetch is None:
                raise ValueError(f"which table? There are {', '.join(TABLES)}; --list says what each takes")
            return
        if table not in TABLES:
            raise ValueError(f"no table {table!r}: there are {', '.join(TABLES)}; latency is timed by thrift bench")
        chosen = TABLES[table]
        if offline:
            stages = chosen.offline(model, text, length)
        else:
            stages = [
                stage for stage in chosen.stages(None if data is None else str(data)) if only in (None, stage.name)
            ]
            if not stages:
                raise ValueError(
                    f"--only must be one of {', '.join(s.name for s in chosen.stages(None))}, got {only!r}"
                )
            for stage in stages:
                takes = plans.estimate(stage)
                say(
                    f"{table}, {stage.name}: about {takes.hours:.1f} h and {takes.gigabytes:.0f} GB of GPU memory on one H100"
                )
        with shown(Console(file=sys.stderr)) as (log, progress):
            said = plans.reproduce(
                chosen, stages, out / table, device=device, dtype=dtype, log=log, progress=progress
            )  # fmt: skip
        print(said, end="")
        path = out / table / "table.md"
        write_files({path: said.encode()})
        say(f"wrote {path}")
