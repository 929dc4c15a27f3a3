"""``thrift eval``: the commands."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from thrift_lab.console import (
    BudgetText,
    Device,
    Dtype,
    Model,
    RecordFile,
    RunFolder,
    Storage,
    TextSource,
    Workers,
    errors,
    in_order,
    numbers,
    old_names_too,
    shown,
    table_console,
    words,
)
from thrift_lab.eval import evidence_cli

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings=old_names_too(),
    cls=in_order(
        *("nll", "methods", "suite", "report", "decode", "cache", "serve", "harness"),
        *("kinds", "power", "frontier", "texts", "residents", "leads"),
    ),
    help="Measure quality: what attention in 4 bits costs a real model on texts and tasks.",
)
app.registered_commands += evidence_cli.app.registered_commands

METHODS = "fp16,fp4,paper,thrift"
Methods = Annotated[
    str,
    typer.Option(
        help="KIND or KIND:OPTION=VALUE,... with commas between: fp16,fp4,thrift:budget=10%,promoted_storage=nested. "
        "`thrift eval methods` lists kinds and options."
    ),
]


@app.command()
def nll(
    model: Model = "smollm2-135m",
    text: TextSource = "shakespeare",
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 8192,
    windows: Annotated[int, typer.Option(help="Windows, one after the other from the start of the text.")] = 1,
    methods: Methods = METHODS,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Also run every method that has a budget and names none at these: 0.01, 5%, max(5%, 16), top_k(4)."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the record here, the NLL of every token beside it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture of recovery against budget here.")] = None,
) -> None:
    """The loss of a text (NLL, nats per token) with each method of attention, against the model's own."""
    sizes = {"length": length, "windows": windows, "device": device, "dtype": dtype}
    run_nll(model, text, methods, words(budget), out=out, plot=plot, **sizes)


def run_nll(
    model: str, text: str, methods: str, budgets: list[str], *, out: Path | None, plot: Path | None, **sizes: Any
) -> None:
    """Run methods on a text, print the table, write the record and the picture.

    Args:
        model: see `thrift_lab.models.load_model`.
        text: see `thrift_lab.eval.texts.load_text`.
        methods: see `thrift_lab.eval.methods.parse_methods`.
        budgets: texts that `Budget.parse` reads.
        out: path of the record.
        plot: path of the picture.
        **sizes: ``length``, ``windows``, ``device`` and ``dtype`` of `thrift_lab.eval.run_nll.evaluate`.
    """
    console = table_console()
    with errors():
        from thrift_attn.config import Budget
        from thrift_lab.eval.methods import parse_methods, sweep
        from thrift_lab.extras import need

        rows = sweep(parse_methods(methods), list(map(Budget.parse, budgets)))
        if plot is not None:
            need("matplotlib", "plot")  # better now than after the run

        from thrift_lab.eval import nll_report
        from thrift_lab.eval.run_nll import beside, evaluate

        with shown(Console(file=sys.stderr)) as (log, progress):
            record = evaluate(model, text, rows, log=log, progress=progress, **sizes)
        console.print()
        console.print(record.table().drawn())
        console.print()
        for note in nll_report.notes(record):
            console.print(note, style="yellow", highlight=False, markup=False)
        console.print(nll_report.sentence(record), highlight=False, markup=False)
        if out is not None:
            record.save(out)
            console.print(f"wrote {out} and {beside(out)}", style="dim", highlight=False, markup=False)
        if plot is not None:
            from thrift_lab.eval.plot import draw

            draw(record, plot)
            console.print(f"wrote {plot}", style="dim", highlight=False, markup=False)


@app.command(name="methods")
def list_methods(
    markdown: Annotated[bool, typer.Option(help="Print the tables as Markdown.")] = False,
) -> None:
    """How methods are written in these commands: every kind, every option and its values."""
    from thrift_lab.eval import grammar

    if markdown:
        print(grammar.markdown(), end="")
        return
    out = table_console()
    for line in grammar.GRAMMAR:
        out.print(line, highlight=False, markup=False)
    for table in (grammar.kinds(), grammar.options()):
        out.print()
        out.print(table.drawn())


@app.command()
def decode(
    model: Model = "smollm2-135m",
    text: TextSource = "shakespeare",
    prompts: Annotated[int, typer.Option(help="Texts, one after the other.")] = 10,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prompt.")] = 4096,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 8000,
    new: Annotated[int, typer.Option(help="Teacher-forced steps after each prompt.")] = 64,
    needles: Annotated[int, typer.Option(help="Depths at which a number is hidden.")] = 10,
    budget: BudgetText = "0.05",
    promoted_storage: Storage = "nested",
    residual_share: Annotated[float, typer.Option(min=0, max=1, help="Of the blocks that keep a residual.")] = 1.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the hidden numbers.")] = 0,
    out: RecordFile = None,
) -> None:
    """Decode through the 4-bit cache, against the same model without it: how far apart, which hidden numbers.

    Teacher-forced: the next tokens of the text are fed one by one, and KL is the divergence of what is predicted for each.
    """
    with errors():
        from thrift_attn.config import ThriftConfig
        from thrift_lab.eval.decode_quality import evaluate
        from thrift_lab.eval.opening import opened

        config = ThriftConfig.for_cache(budget=budget, promoted_storage=promoted_storage, residual_share=residual_share)
        chars = 8 * prompts * (longest + new)
        with opened(model, text, chars, device=device, dtype=dtype) as (loaded, source, log):
            record = evaluate(
                loaded, source.content, config=config, prompts=prompts, shortest=shortest, longest=longest, new=new,
                needles=needles, seed=seed, text_name=source.name, log=log,
            )  # fmt: skip
        print(record.sentence())
        if out is not None:
            record.save(out)
            print(f"wrote {out}")


@app.command()
def cache(
    model: Model = "smollm2-135m",
    text: TextSource = "shakespeare",
    shares: Annotated[str, typer.Option(help="Shares of blocks that keep a residual, the first to compare with.")] = (
        "1,0.15,0"
    ),
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 8192,
    windows: Annotated[int, typer.Option(help="Windows, one after the other.")] = 1,
    chunk: Annotated[int, typer.Option(help="Tokens at a time.")] = 64,
    steps: Annotated[int, typer.Option(help="Tokens at the end of each that are decoded one by one.")] = 256,
    budget: BudgetText = "max(5%, 16)",
    promoted_storage: Storage = "nested",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: RecordFile = None,
) -> None:
    """The loss of a text that goes through the cache, by the share of its blocks that keep a residual.

    First in chunks, each attending to the pages of those before it, then token by token.
    """
    with errors():
        from thrift_attn.config import ThriftConfig
        from thrift_lab.eval.nll import chars_needed
        from thrift_lab.eval.opening import opened
        from thrift_lab.eval.through_cache import evaluate

        config = ThriftConfig.for_cache(budget=budget, promoted_storage=promoted_storage)
        try:
            kept_shares = tuple(config.with_(residual_share=float(x)).residual_share for x in words(shares))
        except ValueError:
            raise ValueError(f"--shares are numbers from 0 to 1, after commas, got {shares!r}") from None
        chars = chars_needed(length, windows)
        with opened(model, text, chars, device=device, dtype=dtype) as (loaded, source, log):
            record = evaluate(
                loaded, source.content, config=config, shares=kept_shares, length=length,
                windows=windows, chunk=chunk, steps=steps, text_name=source.name, log=log,
            )  # fmt: skip
        table_console().print(record.table().drawn())
        if out is not None:
            record.save(out)
            print(f"wrote {out}")


def _changed(plan: Any, **given: Any) -> Any:
    """Return the plan with what was given on the command line."""
    return replace(plan, **{key: value for key, value in given.items() if value is not None})


@app.command()
def suite(
    out: RunFolder,
    preset: Annotated[
        Literal["quick", "full"], typer.Option(help="quick: on a CPU, minutes; full: on a GPU, hours.")
    ] = "quick",
    model: Model = "smollm2-135m",
    methods: Annotated[
        str | None, typer.Option(help="Instead of the preset's: fp16,fp4,thrift:budget=0.1,... see `thrift eval nll`.")
    ] = None,
    baselines: Annotated[
        str | None, typer.Option(help="Add quest, topk, local and snapkv at the cost of this method.")
    ] = None,
    texts: Annotated[list[str] | None, typer.Option(help="For NLL; the first is also RULER's haystack.")] = None,
    nll_lengths: Annotated[list[str] | None, typer.Option(help="Tokens of NLL windows; '' for none.")] = None,
    windows: Annotated[int | None, typer.Option(help="NLL windows of each text and length.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Names, families (ruler, helmet, longbench) or all; '' for none.")
    ] = None,
    lengths: Annotated[list[str] | None, typer.Option(help="Most tokens of a task's samples.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of each task and length.")] = None,
    max_new: Annotated[int | None, typer.Option(help="Most tokens of an answer; as published if not given.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder with the published files (docs/evaluation.md), or standin.")
    ] = None,
    hub: Annotated[bool | None, typer.Option("--hub/--no-hub", help="Read LongBench from the hub.")] = None,
    concentration: Annotated[int | None, typer.Option(help="Tokens for error concentration; 0 for none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the generated tasks.")] = None,
    workers: Workers = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Tasks, losses and where the error sits, of many methods; can be stopped and taken up again.

    Options that take several values are given several times, or with commas.
    """
    with errors():
        from thrift_lab.eval.presets import PRESETS, with_baselines
        from thrift_lab.eval.suite import run

        plan = _changed(
            PRESETS[preset](model),
            methods=methods,
            texts=None if texts is None else tuple(words(texts)),
            nll_lengths=None if nll_lengths is None else numbers(nll_lengths),
            windows=windows,
            tasks=None if tasks is None else ",".join(words(tasks)),
            lengths=None if lengths is None else numbers(lengths),
            samples=samples,
            max_new=max_new,
            chat=chat,
            data=data,
            hub=hub,
            concentration=concentration,
            seed=seed,
        )
        if baselines is not None:
            plan = replace(plan, methods=with_baselines([plan.methods], baselines))
        with shown(Console(file=sys.stderr)) as (log, progress):
            run(plan, out, device=device, dtype=dtype, workers=workers, log=log, progress=progress)
        _written([out], out / "report.html", None)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs, and JSON records of `thrift eval nll` and of `thrift bench`."),
    ],
    html: Annotated[Path | None, typer.Option(help="Write the page here; beside the run by default.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown here.")] = None,
) -> None:
    """Write one self-contained HTML page about runs and records, finished or not.

    Those of one model become one chapter; records of `thrift bench decode`, `prefill` and `e2e` chapters on speed and memory.
    """
    with errors():
        if html is None and markdown is None:
            html = runs[0] / "report.html" if runs[0].suffix != ".json" else runs[0].with_suffix(".html")
        _written(runs, html, markdown)


def _written(runs: list[Path], html: Path | None, markdown: Path | None) -> None:
    """Write the reports and print what they say."""
    from thrift_lab.eval import page
    from thrift_lab.eval.runs import load_runs
    from thrift_lab.eval.speed import SPEED_KINDS
    from thrift_lab.provenance import write_files
    from thrift_lab.records import kind_of

    loaded, benches = (
        load_runs(runs),
        [path for path in runs if path.suffix == ".json" and kind_of(path) in SPEED_KINDS],
    )
    for path, text in ((html, page.html), (markdown, page.markdown)):
        if path is not None:
            write_files({path: text(loaded, benches).encode()})
    for run in loaded:
        print(run.plan["model"])
        for sentence in page.findings(run):
            print(f"  {sentence}")
    for path in filter(None, (html, markdown)):
        print(f"wrote {path}")


@app.command()
def leads(
    record: Annotated[Path, typer.Argument(help="quality-leads.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("quality-leads.png"),
) -> None:
    """Draw where the loss of 4-bit attention comes from, from quality-leads.json."""
    with errors():
        from thrift_lab.eval.quality_leads import draw

        print(f"wrote {draw(record, out)}")


@app.command()
def harness(
    tasks: Annotated[list[str], typer.Option(help="Tasks of lm-evaluation-harness.")],
    model: Model = "smollm2-135m",
    methods: Methods = "fp16,fp4,thrift",
    limit: Annotated[int | None, typer.Option(help="Samples of each task; all if not given.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the results here as JSON.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Run tasks of lm-evaluation-harness with each method inside the model."""
    with errors():
        from thrift_lab.eval.harness import evaluate
        from thrift_lab.eval.methods import parse_methods
        from thrift_lab.models import load_model
        from thrift_lab.provenance import write_files

        rows = parse_methods(methods)
        with shown(Console(file=sys.stderr)) as (log, progress):
            loaded = load_model(model, device=device, dtype=dtype, log=log)
            results = {}
            for at, method in enumerate(rows):
                progress(method.name, at, len(rows))
                results[method.name] = evaluate(loaded, method, words(tasks), limit=limit)
        text = json.dumps(results, indent=1, default=str)
        if out is None:
            print(text)
        else:
            write_files({out: f"{text}\n".encode()})
            print(f"wrote {out}")
