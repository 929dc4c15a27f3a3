"""The commands ``thrift eval suite``, ``thrift eval report`` and ``thrift eval harness``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from thrift_lab.eval.console import Device, Dtype, Model, errors, shown


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from a comma-separated list.

    Raises:
        ValueError: something else.
    """
    try:
        return tuple(int(piece) for piece in text.split(",") if piece.strip())
    except ValueError as error:
        raise ValueError(f"expected whole numbers with commas between them, got {text!r}") from error


def _changed(plan: Any, **given: Any) -> Any:
    """The plan with what was given on the command line."""
    return replace(plan, **{key: value for key, value in given.items() if value is not None})


def suite(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an unfinished one goes on.")],
    preset: Annotated[str, typer.Option(help="quick (CPU, minutes) or full (GPU).")] = "quick",
    model: Model = "smollm2-135m",
    methods: Annotated[
        str | None, typer.Option(help="Instead of the preset's: fp16,fp4,thrift:budget=0.1,... see `thrift eval nll`.")
    ] = None,
    baselines: Annotated[
        str | None, typer.Option(help="Add quest, topk, local and snapkv at the cost of this method.")
    ] = None,
    texts: Annotated[str | None, typer.Option(help="For NLL; the first is also RULER's haystack.")] = None,
    nll_lengths: Annotated[str | None, typer.Option(help="Tokens of NLL windows, with commas; '' for none.")] = None,
    windows: Annotated[int | None, typer.Option(help="NLL windows of each text and length.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Names, families (ruler, helmet, longbench) or all; '' for none.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Most tokens of a task's samples, with commas.")] = None,
    samples: Annotated[int | None, typer.Option(help="Samples of each task and length.")] = None,
    max_new: Annotated[int | None, typer.Option(help="Most tokens of an answer; as published if not given.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder with the published files (docs/evaluation.md), or standin.")
    ] = None,
    hub: Annotated[bool | None, typer.Option("--hub/--no-hub", help="Read LongBench from the hub.")] = None,
    concentration: Annotated[int | None, typer.Option(help="Tokens for error concentration; 0 for none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the generated tasks.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Tasks, NLL and error concentration of many methods; started again it goes on where it stopped."""
    with errors():
        from thrift_lab.eval.presets import PRESETS, with_baselines
        from thrift_lab.eval.suite import run

        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        plan = _changed(
            PRESETS[preset](model),
            methods=methods,
            texts=None if texts is None else tuple(filter(None, texts.split(","))),
            nll_lengths=None if nll_lengths is None else _numbers(nll_lengths),
            windows=windows,
            tasks=tasks,
            lengths=None if lengths is None else _numbers(lengths),
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
        with shown(Console(file=sys.stderr)) as (notify, progress):
            run(plan, output, device=device, dtype=dtype, notify=notify, progress=progress)
        _written([output], output / "report.html", None)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, and JSON records of `thrift eval nll`.")],
    html: Annotated[Path | None, typer.Option(help="Write the page here; beside the run by default.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown here.")] = None,
) -> None:
    """One self-contained HTML page (and Markdown) about runs, finished or not; those of one model become one chapter."""
    with errors():
        if html is None and markdown is None:
            html = runs[0] / "report.html" if runs[0].suffix != ".json" else runs[0].with_suffix(".html")
        _written(runs, html, markdown)


def _written(runs: list[Path], html: Path | None, markdown: Path | None) -> None:
    """Write the reports and say what they say."""
    from thrift_lab.eval import page
    from thrift_lab.eval.runs import load_runs

    loaded = load_runs(runs)
    for path, text in ((html, page.html), (markdown, page.markdown)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(loaded), encoding="utf-8")
    for one in loaded:
        print(one.plan["model"])
        for sentence in page.findings(one):
            print(f"  {sentence}")
    for path in filter(None, (html, markdown)):
        print(f"wrote {path}")


def harness(
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, with commas.")],
    model: Model = "smollm2-135m",
    methods: Annotated[str, typer.Option(help="See `thrift eval nll`.")] = "fp16,fp4,thrift",
    limit: Annotated[int | None, typer.Option(help="Samples of each task; all if not given.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the results here as JSON.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Run tasks of lm-evaluation-harness with each method inside the model."""
    with errors():
        from thrift_lab.eval.harness import evaluate
        from thrift_lab.eval.methods import parse_methods
        from thrift_lab.eval.models import load_model

        loaded = load_model(model, device=device, dtype=dtype)
        names = [name for name in tasks.split(",") if name.strip()]
        results = {method.name: evaluate(loaded, method, names, limit=limit) for method in parse_methods(methods)}
        text = json.dumps(results, indent=1, default=str)
        if output is None:
            print(text)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text + "\n", encoding="utf-8")
            print(f"wrote {output}")


def add_to(app: typer.Typer) -> None:
    """Add the commands to ``thrift eval``."""
    for command in (suite, report, harness):
        app.command()(command)
