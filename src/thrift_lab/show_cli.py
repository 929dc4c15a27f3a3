"""``thrift show``: the table of any record, whichever command left it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thrift_lab.console import errors, table_console

if TYPE_CHECKING:
    from thrift_lab.records import Record

app = typer.Typer()
"""Its one command is one of ``thrift``, which takes it in."""


def classes() -> Iterator[type[Record]]:
    """Every class of records, in such an order that those whose modules take long to import come last."""
    from thrift_lab.eval.run_nll import NLLRecord

    yield NLLRecord
    from thrift_lab.bench.bench_records import BenchRecord
    from thrift_lab.bench.compile import CompileRecord
    from thrift_lab.bench.crossover import CrossoverRecord
    from thrift_lab.bench.e2e_records import ModelRecord

    yield from (BenchRecord, ModelRecord, CrossoverRecord, CompileRecord)
    from thrift_lab.serving.serve_records import ServeRecord
    from thrift_lab.serving.served_nll import ServedRecord

    yield from (ServeRecord, ServedRecord)
    from thrift_lab.fuzz.campaign import FuzzRecord
    from thrift_lab.gpu_tests import GPUTestRecord
    from thrift_lab.matrix_tests import MatrixRecord
    from thrift_lab.run_tests import InstallRecord
    from thrift_lab.vllm_tests import VLLMRecord

    yield from (FuzzRecord, GPUTestRecord, InstallRecord, MatrixRecord, VLLMRecord)
    from thrift_lab.eval.decode_quality import DecodeRecord
    from thrift_lab.eval.residents.ablation import ResidentsRecord
    from thrift_lab.eval.through_cache import ThroughCacheRecord

    yield from (DecodeRecord, ThroughCacheRecord, ResidentsRecord)


def load_record(path: Path) -> Record:
    """Return the record in a file, of the class that its kind belongs to.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, no JSON, no record of a known kind, or one that its class refuses.
    """
    from thrift_lab.records import read_json

    if path.is_dir():
        raise ValueError(f"{path} is a folder: `thrift eval report` tells what a run has found")
    found, known = read_json(path), []
    kind = found.get("kind") if isinstance(found, dict) else None
    for one in classes():
        if kind in one.KINDS:
            return one.load(path)
        known += one.KINDS
    raise ValueError(f"{path} names no kind of record that is known: there are {', '.join(sorted(known))}")


def circumstances(context: dict[str, Any]) -> str:
    """When, with which commit and on what a record was made."""
    machine = context.get("machine", {})
    where = context.get("device") or machine.get("gpu") or machine.get("cpu")
    told = (context.get("created", "")[:10], f"commit {context['commit'][:12]}" if context.get("commit") else "", where)
    return ", ".join(filter(None, told))


@app.command()
def show(
    record: Annotated[Path, typer.Argument(help="The JSON file of a record.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Of `thrift eval nll`, only these at any budget (paper,thrift:compute=16bit); fp16 and fp4 always."
        ),
    ] = "",
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Of `thrift eval nll`: draw the picture again.")] = None,
) -> None:
    """Print the table of a record that any of these commands wrote."""
    with errors():
        found = load_record(record)
        if methods or plot is not None:
            from thrift_lab.eval.nll_report import only
            from thrift_lab.eval.run_nll import NLLRecord

            if not isinstance(found, NLLRecord):
                raise ValueError(
                    "--methods and --plot are for records of `thrift eval nll`; `thrift bench plot` draws those of speed"
                )
            found = only(found, methods) if methods else found
            if plot is not None:
                from thrift_lab.eval.plot import draw

                draw(found, plot)
        if markdown:
            print(found.markdown())
            return
        console = table_console(150)
        console.print(found.table().drawn())
        console.print(circumstances(found.context), style="dim", highlight=False, markup=False)
