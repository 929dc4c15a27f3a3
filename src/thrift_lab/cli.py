"""The ``thrift`` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console

    from thrift_lab.bench.bench_cli import app as bench
    from thrift_lab.eval import eval_cli as suites
    from thrift_lab.eval.console import Device, Dtype, Model, Promoted, Storage, TextSource, errors, shown
except ImportError as error:
    raise SystemExit(f"the thrift command needs {error.name}: pip install 'thrift-attn[eval]'") from error

# Everything heavier is imported inside the commands, so that --help answers at once.

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Long-context attention on a 4-bit budget.")
evals = typer.Typer(no_args_is_help=True, help="Measure what a method costs on a real model and text.")
suites.add_to(evals)
app.add_typer(evals, name="eval")
app.add_typer(bench, name="bench")

DEMO_METHODS = "fp16,fp4,paper,thrift"
DEMO_BUDGETS = "0,0.15"


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for record.json and recovery.png.")] = Path(
        "demo"
    ),
    length: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    device: Device = "auto",
) -> None:
    """Run fp16, fp4, paper and thrift on SmolLM2-135M and Shakespeare: how much does FP4 lose, how much comes back?"""
    _nll(
        "smollm2-135m",
        "shakespeare",
        methods=DEMO_METHODS,
        budgets=DEMO_BUDGETS,
        length=length,
        windows=1,
        device=device,
        dtype="auto",
        json=output / "record.json",
        plot=output / "recovery.png",
    )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: Model = "smollm2-135m",
    file: Annotated[Path | None, typer.Option(help="A text that is put before the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens at most.")] = 256,
    budget: Promoted = "0.05",
    high: Storage = "nested",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chunk: Annotated[int | None, typer.Option(help="Tokens of the prompt at a time.")] = None,
    raw: Annotated[bool, typer.Option(help="No chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer a prompt through the 4-bit cache, streaming; then say how fast, how many bytes and what was promoted."""
    with errors():
        import torch

        from thrift_attn.config import Budget, ThriftConfig
        from thrift_lab import chat
        from thrift_lab.eval.models import load_model

        config = ThriftConfig.for_cache(budget=Budget.parse(budget), promoted_storage=high)
        pick = chat.sampler(temperature, top_p)
        text = sys.stdin.read() if prompt == "-" else prompt
        if file is not None:
            text = f"{file.read_text(encoding='utf-8')}\n\n{text}"
        err = Console(stderr=True)
        loaded = load_model(model, device=device, dtype=dtype, notify=lambda line: err.print(line, style="dim"))
        ids, cost = chat.prompt_ids(loaded, text, raw=raw), chat.Cost()
        torch.manual_seed(seed)
        for piece in chat.answer(
            loaded, ids, cost, config=config, max_new_tokens=max_new_tokens, pick=pick, chunk=chunk
        ):
            print(piece, end="", flush=True)
        print(flush=True)
        for line in cost.lines():
            err.print(line, style="dim", highlight=False, markup=False)


@evals.command()
def decode(
    model: Model = "smollm2-135m",
    text: TextSource = "shakespeare",
    prompts: Annotated[int, typer.Option(help="Texts, one after the other.")] = 10,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prompt.")] = 4096,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 8000,
    new: Annotated[int, typer.Option(help="Teacher-forced steps after each prompt.")] = 64,
    needles: Annotated[int, typer.Option(help="Depths at which a number is hidden.")] = 10,
    budget: Promoted = "0.05",
    high: Storage = "nested",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the hidden numbers.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the record here.")] = None,
) -> None:
    """Decoding through the 4-bit cache against the same model without it: teacher-forced KL, and hidden needles."""
    with errors():
        from thrift_attn.config import Budget, ThriftConfig
        from thrift_lab.eval.decode_quality import evaluate
        from thrift_lab.eval.models import load_model
        from thrift_lab.eval.texts import load_text

        config, err = ThriftConfig.for_cache(budget=Budget.parse(budget), promoted_storage=high), Console(stderr=True)

        def say(line: str) -> None:
            err.print(line, style="dim", highlight=False, markup=False)

        loaded = load_model(model, device=device, dtype=dtype, notify=say)
        found = load_text(text, 8 * prompts * (longest + new), say)
        record = evaluate(
            loaded, found.content, config=config, prompts=prompts, shortest=shortest, longest=longest, new=new,
            needles=needles, seed=seed, text_name=found.name, say=say,
        )  # fmt: skip
        print(record.sentence())
        if json is not None:
            record.save(json)


@evals.command()
def nll(
    model: Model = "smollm2-135m",
    text: TextSource = "pg19",
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 8192,
    windows: Annotated[int, typer.Option(help="Windows, one after the other from the start of the text.")] = 1,
    methods: Annotated[
        str, typer.Option(help="Comma-separated, options after a colon: fp16,fp4,thrift:budget=0.1,high=nested")
    ] = DEMO_METHODS,
    budgets: Annotated[
        str, typer.Option(help="Also run every method that has a budget and names none at these: 0.01,5%,top_k(4)")
    ] = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the record here, the NLL of every token beside it.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture of recovery against budget here.")] = None,
) -> None:
    """NLL of methods on long windows of a text, against the model's own attention."""
    _nll(
        model,
        text,
        methods=methods,
        budgets=budgets,
        length=length,
        windows=windows,
        device=device,
        dtype=dtype,
        json=json,
        plot=plot,
    )


@evals.command()
def show(
    record: Annotated[Path, typer.Argument(help="JSON record of `thrift eval nll`.")],
    methods: Annotated[
        str, typer.Option(help="Only these at any budget (paper,thrift:math=16bit); fp16 and fp4 always.")
    ] = "",
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the picture again.")] = None,
) -> None:
    """Print and draw a record again."""
    with errors():
        from dataclasses import replace

        from thrift_lab.eval import nll_report as report
        from thrift_lab.eval.methods import parse_methods
        from thrift_lab.eval.run_nll import Result, is_fp4

        result = Result.load(record)
        wanted = parse_methods(methods) if methods else [row.method for row in result.rows]
        families = {method.family for method in wanted}
        kept = [r for r in result.rows if r.method.config is None or is_fp4(r.method) or r.method.family in families]
        result = replace(result, rows=kept)
        if markdown:
            print(report.markdown(result))
        else:
            _console().print(report.table(result))
        if plot is not None:
            from thrift_lab.eval.plot import draw

            draw(result, plot)


@app.command()
def doctor() -> None:
    """Print versions, what this device can do and what is cached; exit code 0 when the commands can run."""
    out = Console()
    try:
        problems = _doctor(out)
    except ImportError as error:
        problems = [str(error)]
    for problem in problems:
        out.print(f"missing: {problem}", style="red", highlight=False, markup=False)
    out.print("[green]usable[/green]" if not problems else "[red]not usable[/red]")
    raise typer.Exit(1 if problems else 0)


def _doctor(out: Console) -> list[str]:
    """Print the tables; return what is missing."""
    import torch
    from rich.table import Table

    from thrift_attn.dispatch import support
    from thrift_lab.eval.assets import MODELS, SHAKESPEARE
    from thrift_lab.eval.extras import missing
    from thrift_lab.eval.fetch import cache_dir, cached
    from thrift_lab.eval.models import is_cached
    from thrift_lab.eval.run_nll import PACKAGES
    from thrift_lab.provenance import device_name, versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = Table(box=None, show_header=False, padding=(0, 1))
    for name, version in versions(PACKAGES).items():
        plain.add_row(name, version or "[dim]not installed[/dim]")
    plain.add_row("device", device_name(device))
    plain.add_row("cache", str(cache_dir()))
    for asset, here in [(asset, is_cached(asset)) for asset in MODELS.values()] + [
        (SHAKESPEARE, bool(cached(SHAKESPEARE)))
    ]:
        size = sum(part.megabytes for part in asset.parts)
        plain.add_row(asset.name, "[green]cached[/green]" if here else f"fetched when first used ({size} MB)")
    out.print(plain)
    out.print()

    table = Table(box=None, padding=(0, 1), header_style="bold")
    for header in ("feature", "status", "why"):
        table.add_column(header)
    colours = {"native": "green", "emulated": "yellow", "no": "red"}
    for row in support(device):
        colour = colours.get(row.status, "default")
        table.add_row(row.feature, f"[{colour}]{row.status}[/{colour}]", row.why)
    out.print(table)
    out.print()

    wanted = (("transformers", "hf"), ("gguf", "eval"), ("matplotlib", "plot"))
    return [problem for module, extra in wanted if (problem := missing(module, extra))]


def _nll(
    model: str,
    text: str,
    *,
    methods: str,
    budgets: str,
    length: int,
    windows: int,
    device: str,
    dtype: str,
    json: Path | None,
    plot: Path | None,
) -> None:
    """Run, print, write."""
    out = _console()
    with errors():
        from thrift_attn.config import Budget
        from thrift_lab.eval.extras import need
        from thrift_lab.eval.methods import parse_methods, sweep

        rows = parse_methods(methods)
        rows = sweep(rows, [Budget.parse(piece) for piece in budgets.split(",") if piece.strip()])
        if plot is not None:
            need("matplotlib", "plot")  # better now than after the run

        from thrift_lab.eval import nll_report as report
        from thrift_lab.eval.run_nll import evaluate

        with shown(Console(file=sys.stderr)) as (notify, progress):
            result = evaluate(
                model,
                text,
                rows,
                length=length,
                windows=windows,
                device=device,
                dtype=dtype,
                notify=notify,
                progress=progress,
            )
        out.print()
        out.print(report.table(result))
        out.print()
        for note in report.notes(result):
            out.print(note, style="yellow", highlight=False, markup=False)
        out.print(report.sentence(result), highlight=False, markup=False)
        if json is not None:
            beside = result.save(json)
            out.print(f"wrote {json} and {beside}", style="dim", highlight=False, markup=False)
        if plot is not None:
            from thrift_lab.eval.plot import draw

            draw(result, plot)
            out.print(f"wrote {plot}", style="dim", highlight=False, markup=False)


def _console() -> Console:
    """Where tables go; a pipe or a file gets the width that they need."""
    return Console() if sys.stdout.isatty() else Console(width=118)


def main() -> None:
    """Entry point of the ``thrift`` command."""
    app()


if __name__ == "__main__":
    sys.exit(main())
