"""Commands beside those of `eval_cli`: ``thrift eval frontier``, ``residents``, ``kinds``, ``texts`` and ``power``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from thrift_lab.console import (
    Device,
    Dtype,
    Model,
    RecordFile,
    RunFolder,
    Storage,
    TextSource,
    Workers,
    errors,
    numbers,
    shown,
    table_console,
    words,
)

KINDS_METHODS = "fp16,fp4,thrift"
LENGTHS, TASKS = ["8192"], ["ruler"]
POWER_METHODS = "fp16,thrift,thrift:budget=2%,cache"

Runs = Annotated[list[Path], typer.Argument(help="Folders of `thrift eval suite`, or records of `thrift eval nll`.")]

app = typer.Typer()
"""Its commands are those of ``thrift eval``, which takes them in."""


@app.command()
def frontier(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", help="The chart.")] = Path("frontier.png"),
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here.")] = None,
) -> None:
    """Chart the loss of methods against their bytes and multiplications: which ones nothing else beats."""
    with errors():
        from thrift_lab.eval import frontier as chart
        from thrift_lab.eval.runs import load_runs

        loaded = load_runs(runs)
        _tell("\n".join(chart.markdown(run, chart.points_of(run)) for run in loaded), markdown)
        print(f"wrote {chart.draw(loaded, out)}")


@app.command()
def residents(
    model: Model = "smollm2-135m",
    text: TextSource = "shakespeare",
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="OPTION=VALUE,... of a rule: share, floor, newest, counts, gather, decay, error, among, planes, seed. "
            "Given several times; the first is what the others are compared with. By default all, the cache's rule, none."
        ),
    ] = None,
    passes: Annotated[int | None, typer.Option(help="Only so many of the first rules get a pass of their own.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the window, a multiple of 64.")] = 8192,
    budget: Annotated[
        str | None, typer.Option(help="Read so many of the residuals, as decode does: 5%, max(5%, 16). By default all.")
    ] = None,
    promoted_storage: Storage = "nested",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: RecordFile = None,
) -> None:
    """Compare rules for which blocks of a cache keep their residual, emulated in one pass over a text."""
    with errors():
        from thrift_attn.config import Budget, ThriftConfig
        from thrift_lab.eval.nll import chars_needed
        from thrift_lab.eval.opening import opened
        from thrift_lab.eval.residents.ablation import evaluate
        from thrift_lab.eval.residents.rules import Rule

        rules = tuple(map(Rule.parse, rule or ("share=1", "", "share=0")))
        promoted = None if budget is None else Budget.parse(budget)
        with opened(model, text, chars_needed(length, 1), device=device, dtype=dtype) as (loaded, source, log):
            record = evaluate(
                loaded, source.content, rules=rules, config=ThriftConfig.for_cache(promoted_storage=promoted_storage),
                promoted=promoted, passes=passes, length=length, text_name=source.name, log=log,
            )  # fmt: skip
        table_console(150).print(record.table().drawn())
        if out is not None:
            record.save(out)
            print(f"wrote {out}")


@app.command()
def texts(
    folder: Annotated[Path, typer.Argument(help="Made if need be; one file for each text.")],
    only: Annotated[list[str] | None, typer.Option(help="Specs such as handbook:ja-JP, source, made:logs.")] = None,
) -> None:
    """Write the texts of `kinds` as files, for a machine without a network."""
    with errors():
        from thrift_lab.eval.kinds import TEXT_KINDS, write

        for path in write(folder, tuple(words(only)) or TEXT_KINDS, lambda line: print(line, file=sys.stderr)):
            print(f"wrote {path}")


@app.command()
def kinds(
    out: RunFolder,
    model: Model = "smollm2-135m",
    texts: Annotated[
        list[str] | None, typer.Option(help="Specs or files; all languages and kinds if not given.")
    ] = None,
    lengths: Annotated[list[str], typer.Option(help="Tokens of a window.")] = LENGTHS,
    methods: Annotated[
        str, typer.Option(help="See `thrift eval nll`; the last is what the table is about.")
    ] = KINDS_METHODS,
    windows: Annotated[int, typer.Option(help="Of each text and length.")] = 1,
    concentration: Annotated[
        int, typer.Option(help="Tokens for error concentration on every text; 0 for none.")
    ] = 2048,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture here.")] = None,
    workers: Workers = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Losses and where the error sits, by language and kind of text; can be stopped and taken up again."""
    with errors():
        from thrift_lab.eval import evidence
        from thrift_lab.eval.kinds import TEXT_KINDS
        from thrift_lab.eval.methods import parse_methods
        from thrift_lab.eval.suite import run
        from thrift_lab.eval.suite_folder import Folder, SuitePlan

        plan = SuitePlan(
            model=model, methods=methods, texts=tuple(words(texts)) or TEXT_KINDS, nll_lengths=numbers(lengths),
            windows=windows, concentration=concentration, concentrate_all=True,
        )  # fmt: skip
        with shown(Console(file=sys.stderr)) as (log, progress):
            run(plan, out, device=device, dtype=dtype, workers=workers, log=log, progress=progress)
        records, last = Folder(out).records(), parse_methods(methods)[-1].name
        _tell(evidence.kinds_table(records, last), markdown)
        if plot is not None:
            print(f"wrote {evidence.draw_kinds(records, last, plot)}")


@app.command()
def power(
    out: RunFolder,
    model: Model = "smollm2-135m",
    methods: Annotated[str, typer.Option(help="`cache` answers through the paged cache.")] = POWER_METHODS,
    tasks: Annotated[list[str], typer.Option(help="Names or families.")] = TASKS,
    lengths: Annotated[list[str], typer.Option(help="Most tokens of a sample.")] = LENGTHS,
    samples: Annotated[int, typer.Option(help="Of each task and length.")] = 100,
    only_telling: Annotated[
        Path | None, typer.Option(help="A run of `power`: only tasks that exact attention scored 20 to 95% on there.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the published files, or standin.")] = None,
    text: Annotated[str, typer.Option(help="RULER's haystack.")] = "shakespeare",
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the table here.")] = None,
    workers: Workers = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Tasks with enough samples to tell methods apart: paired differences to exact attention, with intervals.

    Exact attention answers once, and intervals are corrected for the number of tasks. A run
    that was stopped goes on where it was.
    """
    with errors():
        from thrift_lab.eval import evidence
        from thrift_lab.eval.suite import run
        from thrift_lab.eval.suite_folder import Folder, SuitePlan

        names = ",".join(words(tasks))
        if only_telling is not None:
            names = ",".join(evidence.between(Folder(only_telling).load()[2]))
            if not names:
                raise ValueError(f"no task of {only_telling} is scored 20 to 95% by exact attention")
        plan = SuitePlan(
            model=model, methods=methods, texts=(text,), tasks=names, lengths=numbers(lengths), samples=samples, chat=chat,
            data=data,
        )  # fmt: skip
        with shown(Console(file=sys.stderr)) as (log, progress):
            run(plan, out, device=device, dtype=dtype, workers=workers, log=log, progress=progress)
        _tell(evidence.power_table(Folder(out).records()), markdown)


def _tell(text: str, path: Path | None) -> None:
    """Print a table, and write it where it is asked for."""
    from thrift_lab.provenance import write_files

    print(text, end="")
    if path is not None:
        write_files({path: text.encode()})
