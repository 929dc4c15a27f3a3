"""``thrift bench``: the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from thrift_lab.console import BudgetText, errors, in_order, numbers, old_names_too, shown, words
from thrift_lab.fuzz.fuzz_cli import fuzz

if TYPE_CHECKING:
    from thrift_lab.bench.e2e_records import ModelCase
    from thrift_lab.bench.run_bench import BenchPlan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings=old_names_too(plot="pictures", no_plot="no-pictures"),
    cls=in_order("decode", "prefill", "e2e", "serve", "plot", "crossover", "compile", "fuzz"),
    help="Measure speed: kernels, models and serving against the fastest baselines, correctness first.",
)

HEADS, HEAD_DIM, TQ, STORAGE, BUDGET, CONFIG = ["32/8"], ["128"], ["1"], ["nested"], ["0.05"], ["default"]
BASE_FORMAT, COMPUTE, DIMS = ["fp8"], ["fp4"], ["128,64"]
"""Defaults of options that may be given several times."""

RESTARTS = 4
"""Times a run is taken up again after a method broke the device."""

COUNT = "THRIFT_BENCH_RESTARTS"
"""Environment variable of a process that took a run up again, set here alone: how often that has happened."""


app.command()(fuzz)


@app.callback()
def _group() -> None:
    """Keep ``decode`` a subcommand however many there are."""


def _run(plan: BenchPlan, console: Console, *, resume: bool, pictures: bool) -> None:
    """Run a plan, print its table and draw its pictures beside the record."""
    from thrift_lab.bench.run_bench import run
    from thrift_lab.bench.timing import DeviceLost

    try:
        record = run(plan, resume=resume, log=lambda line: console.print(line, highlight=False, markup=False))
    except DeviceLost as error:
        _take_up_again(console, error)
        raise typer.Exit(3) from error
    console.print()
    console.print(record.table().drawn())
    if pictures:
        from thrift_lab.bench.plots import draw

        draw(record, plan.out.parent)
    console.print(f"wrote {plan.out}", style="dim", highlight=False, markup=False)
    _judge(record.rows, console)


def _judge(rows: Iterable[Any], console: Console) -> None:
    """End with exit code 1 when one of our own rows is wrong or failed: a benchmark without us is no benchmark."""
    bad = [row for row in rows if row.ours and row.status in ("wrong", "failed")]
    for row in bad:
        console.print(f"{row.case.name}, {row.status}: {row.reason}", style="red", highlight=False, markup=False)
    if bad:
        raise typer.Exit(1)


@app.command()
def decode(
    preset: Annotated[
        Literal["smoke", "target", "quick", "full"], typer.Option(help="Not used when --batch and --kv are given.")
    ] = "quick",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the record and the pictures.")] = Path("bench"),
    batch: Annotated[list[str] | None, typer.Option(help="Own grid: batch sizes such as 1,8.")] = None,
    kv: Annotated[list[str] | None, typer.Option(help="Own grid: cache lengths such as 32768,131072.")] = None,
    heads: Annotated[list[str], typer.Option(help="Own grid: Hq/Hkv such as 32/8,28/4.")] = HEADS,
    head_dim: Annotated[list[str], typer.Option(help="Own grid: D.")] = HEAD_DIM,
    tq: Annotated[list[str], typer.Option(help="Own grid: new tokens of each sequence.")] = TQ,
    promoted_storage: Annotated[list[str], typer.Option(help="Own grid: nested, nested8, 16bit.")] = STORAGE,
    budget: Annotated[list[str], typer.Option(help="Own grid: budgets such as 0.05,0.1.")] = BUDGET,
    config: Annotated[list[str], typer.Option(help="Own grid: default, paper.")] = CONFIG,
    only: Annotated[list[str] | None, typer.Option(help="Only methods whose names begin so: thrift,cudnn.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="No methods whose names begin so.")] = None,
    replays: Annotated[int, typer.Option(min=5, help="Timed graph replays of the fastest setting.")] = 50,
    minutes: Annotated[float, typer.Option(help="Begin no new shape after this.")] = 60.0,
    compile_seconds: Annotated[float, typer.Option(help="What FlashInfer's compiler may take.")] = 400.0,
    profile: Annotated[bool, typer.Option(help="Also list the kernels of our step as the profiler sees them.")] = True,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    resume: Annotated[bool, typer.Option(help="Keep the rows that the record in --out has already.")] = False,
    pictures: Annotated[bool, typer.Option(help="Draw the pictures.")] = True,
) -> None:
    """One step of decode, whole and by kernel, against the BF16 and FP8 kernels that people use."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    with errors():
        from thrift_lab.bench.timing import Settings, require_cuda

        require_cuda()
        from thrift_lab.bench.cases import PRESETS, grid
        from thrift_lab.bench.run_bench import BenchPlan

        if bool(batch) != bool(kv):
            raise ValueError("an own grid needs both --batch and --kv")
        if batch:
            cases = tuple(
                case
                for dim in numbers(head_dim)
                for new in numbers(tq)
                for storage in words(promoted_storage)
                for share in words(budget)
                for name in words(config)
                for case in grid(
                    batches=numbers(batch),
                    lengths=numbers(kv),
                    heads=map(_heads, words(heads)),
                    head_dim=dim,
                    tq=new,
                    promoted_storage=storage,
                    budget=share,
                    config_name=name,
                )
            )
        else:
            cases = PRESETS[preset]
        plan = BenchPlan(
            cases=cases,
            out=out / "decode.json",
            only=tuple(words(only)),
            skip=tuple(words(skip)),
            settings=Settings(replays=replays),
            minutes=minutes,
            compile_seconds=compile_seconds,
            profile=profile,
            seed=seed,
        )
        _run(plan, console, resume=resume, pictures=pictures)


@app.command()
def e2e(
    model: Annotated[
        str, typer.Option(help="llama-3.1-8b or qwen3-8b (random weights), or a folder or hub id.")
    ] = "llama-3.1-8b",
    cases: Annotated[
        str,
        typer.Option(help="CONTEXTxBATCH after commas; with :fill the cache is filled instead of read from a prompt."),
    ] = "131072x1,131072x3:fill",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the record and the picture.")] = Path("bench"),
    new: Annotated[int, typer.Option(min=2, help="Timed decode steps.")] = 32,
    budget: BudgetText = "0.05",
    fused: Annotated[bool, typer.Option(help="Fuse norms, rotary embeddings and gates, on all sides.")] = True,
    largest: Annotated[bool, typer.Option(help="Also look for the largest context that fits.")] = True,
    full: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Also decode as many sequences of so many tokens as fit at once."),
    ] = None,
    residual_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Also a cache in which this share of blocks keeps its residual.")
    ] = None,
    as_is: Annotated[bool, typer.Option(help="Also time the step of transformers as it is.")] = True,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=1, metavar="GIB", help="Use no more than a GPU of this size has: 79.2 for one of 80 GB."),
    ] = None,
    device: Annotated[str, typer.Option(help="cuda; cpu runs with --no-fused, but its times mean nothing.")] = "cuda",
    seed: Annotated[int, typer.Option(help="Of weights, prompts and fillings.")] = 0,
) -> None:
    """A whole model against BF16, with CUDA graphs on both sides: prompt, first token, decode, memory."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    with errors():
        if device != "cpu":
            from thrift_lab.bench.timing import require_cuda

            require_cuda()
        from thrift_attn.config import Budget
        from thrift_lab.bench import e2e as whole
        from thrift_lab.bench.e2e_plot import draw

        path = out / f"{Path(model).name}.json"
        plan = whole.ModelPlan(
            model, tuple(map(_case, words(cases))), path, new, Budget.parse(budget), fused, largest, full, residual_share,
            device, seed, as_is, gpu_memory=gpu_memory,
        )  # fmt: skip
        record = whole.run(plan, log=lambda line: console.print(line, highlight=False, markup=False))
        console.print()
        console.print(record.table().drawn())
        draw(record, path.with_suffix(".png"))
        console.print(f"wrote {path}", style="dim", highlight=False, markup=False)
        _judge(record.rows, console)


def _case(text: str) -> ModelCase:
    """``131072x3:fill`` as a case."""
    from thrift_lab.bench.e2e_records import ModelCase

    sizes, _, how = text.partition(":")
    parts = sizes.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts) or how not in ("", "fill"):
        raise ValueError(f"a case must look like 131072x1 or 131072x3:fill, got {text!r}")
    return ModelCase(int(parts[0]), int(parts[1]), not how)


@app.command()
def prefill(
    preset: Annotated[Literal["smoke", "target", "full"], typer.Option(help="Not used when --kv is given.")] = "target",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the record and the picture.")] = Path("bench"),
    kv: Annotated[list[str] | None, typer.Option(help="Own grid: prompt lengths such as 32768,131072.")] = None,
    base_format: Annotated[list[str], typer.Option(help="Own grid: formats such as fp8,nvfp4.")] = BASE_FORMAT,
    compute: Annotated[list[str], typer.Option(help="Own grid: fp4 or 16bit.")] = COMPUTE,
    heads: Annotated[list[str], typer.Option(help="Own grid: Hq/Hkv such as 32/8.")] = HEADS,
    head_dim: Annotated[int, typer.Option(help="Own grid: D.")] = 128,
    budget: Annotated[list[str], typer.Option(help="Own grid: budgets such as 0.05,0.1.")] = BUDGET,
    config: Annotated[list[str], typer.Option(help="Own grid: default, paper.")] = CONFIG,
    only: Annotated[list[str] | None, typer.Option(help="Only methods whose names begin so: thrift,cudnn.")] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="No methods whose names begin so; NAME@131072 at one length.")
    ] = None,
    replays: Annotated[int, typer.Option(min=5, help="Timed graph replays.")] = 9,
    minutes: Annotated[float, typer.Option(help="Begin no new shape after this.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    resume: Annotated[bool, typer.Option(help="Keep the rows that the record in --out has already.")] = False,
    pictures: Annotated[bool, typer.Option(help="Draw the picture.")] = True,
) -> None:
    """Attention over a whole prompt, and its stages, against the BF16 and 8-bit kernels that people use."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    with errors():
        from thrift_lab.bench.timing import Settings, require_cuda

        require_cuda()
        from thrift_lab.bench.cases import PREFILL_PRESETS, prefill_grid
        from thrift_lab.bench.run_bench import BenchPlan

        if kv:
            cases = prefill_grid(
                numbers(kv),
                base_formats=words(base_format),
                computes=words(compute),
                heads=map(_heads, words(heads)),
                budgets=words(budget),
                config_names=words(config),
                head_dim=head_dim,
            )
        else:
            cases = PREFILL_PRESETS[preset]
        plan = BenchPlan(
            cases=cases,
            out=out / "prefill.json",
            only=tuple(words(only)),
            skip=tuple(words(skip)),
            settings=Settings(replays=replays, warmup=1, trial_replays=5),
            minutes=minutes,
            profile=False,
            seed=seed,
        )
        _run(plan, console, resume=resume, pictures=pictures)


@app.command()
def crossover(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the record, named after the GPU.")] = Path(
        "benchmarks/results/crossover"
    ),
    dims: Annotated[list[str], typer.Option(help="Head dims.")] = DIMS,
    replays: Annotated[int, typer.Option(min=3, help="Timed graph replays of each of three rounds.")] = 7,
) -> None:
    """Find the length from which on thrift is faster than exact 16-bit attention on this GPU.

    The record is the source of `thrift_attn.crossovers`.
    """
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    with errors():
        from thrift_lab.bench.timing import require_cuda

        require_cuda()
        from thrift_lab.bench import crossover as crossing

        def log(line: str) -> None:
            console.print(line, highlight=False, markup=False)

        record, path = crossing.run(out, dims=numbers(dims), replays=replays, log=log)
        for line in crossing.conclusions(record):
            log(line)
        console.print(f"wrote {path}", style="dim", highlight=False, markup=False)
        wrong = [row for row in record.rows if row.reason.startswith("wrong")]
        if any(row.side == "thrift" and row.us is None for row in record.rows) or wrong:
            console.print("some calls are wrong or failed: see the record", style="red", highlight=False)
            raise typer.Exit(1)


@app.command(name="compile")
def compile_kernels(
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the record.")] = Path("bench/compile.json"),
    dims: Annotated[str, typer.Option(help="Head dims, several after commas; all by default.")] = "",
    capabilities: Annotated[str, typer.Option(help="Compute capabilities times ten, such as 90,120.")] = "",
    kernels: Annotated[str, typer.Option(help="Names of kernels or parts of them; all by default.")] = "",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    compare: Annotated[Path | None, typer.Option(help="A record to compare the machine code with.")] = None,
    reasons: Annotated[Path | None, typer.Option(help="JSON file of expected differences: pattern and reason.")] = None,
    commit: Annotated[str, typer.Option(help="Commit of the tree on PYTHONPATH, if it is another one.")] = "",
) -> None:
    """Compile every kernel for every GPU it is meant for, without one: instructions, registers, spills.

    With --compare the exit code is 1 if machine code differs for no listed reason.
    """
    with errors():
        from thrift_lab.bench import compile as compiling
        from thrift_lab.bench.launches import CAPABILITIES, HEAD_DIMS, cases
        from thrift_lab.records import make_context

        before = compiling.CompileRecord.load(compare) if compare else None
        why = compiling.load_reasons(reasons) if reasons else {}
        listed = compiling.collect(cases(numbers(dims) or HEAD_DIMS), numbers(capabilities) or CAPABILITIES)
        wanted = words(kernels) or [""]
        listed = [one for one in listed if any(word in one.kernel for word in wanted)]
        record = compiling.CompileRecord(
            context=make_context(("torch", "triton"), **({"commit_compiled": commit} if commit else {}))
        )
        with shown(Console(stderr=True)) as (_, progress):
            for row in compiling.compile_all(listed, workers):
                record.rows.append(row)
                progress(row.kernel, len(record.rows), len(listed))
                if row.problems:
                    problems = "; ".join(row.problems)
                    typer.echo(f"{row.key}: {row.registers} registers, {row.shared} bytes shared, {problems}")
        record.save(out)
        green = sum(not row.problems for row in record.rows)
        typer.echo(f"{green} of {len(record.rows)} launches green; wrote {out}")
        if before is None:
            return
        differences = compiling.compare(before, record)
        unexplained, counts = compiling.explained(differences, why)
        equal = len(record.rows) - sum(one.after is not None for one in differences)
        typer.echo(f"{equal} launches compile to the same machine code as in {compare}")
        for pattern, count in counts.items():
            typer.echo(f"{count} differ, {pattern}: {why[pattern]}")
        for difference in unexplained:
            typer.echo(f"differs for no listed reason: {difference}")
        if unexplained:
            raise typer.Exit(1)


@app.command(name="plot")
def plot_record(
    record: Annotated[Path, typer.Argument(help="A record of this command.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the pictures; by default the record's.")
    ] = None,
) -> None:
    """Draw the pictures of a record again."""
    with errors():
        from thrift_lab.records import kind_of

        if kind_of(record) == "e2e":
            from thrift_lab.bench import e2e_plot
            from thrift_lab.bench.e2e_records import ModelRecord

            typer.echo(
                f"wrote {e2e_plot.draw(ModelRecord.load(record), (out or record.parent) / f'{record.stem}.png')}"
            )
            return
        from thrift_lab.bench.bench_records import BenchRecord
        from thrift_lab.bench.plots import draw

        for path in draw(BenchRecord.load(record), out or record.parent):
            typer.echo(f"wrote {path}")


def _heads(text: str) -> tuple[int, int]:
    """``32/8`` as numbers."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"heads must look like 32/8, got {text!r}")
    return int(parts[0]), int(parts[1])


def _take_up_again(console: Console, error: Exception) -> None:
    """Start this command anew in place of this process: a broken CUDA context cannot be mended from within."""
    count = int(os.environ.get(COUNT, "0"))
    console.print(f"{error}", style="red", highlight=False, markup=False)
    if count >= RESTARTS:
        return
    os.environ[COUNT] = str(count + 1)
    arguments = [word for word in sys.argv[1:] if word not in ("--resume", "--no-resume")]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", _entry(), *arguments, "--resume"])


def _entry() -> str:
    """The module that this process was started as."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = getattr(spec, "name", None) or "thrift_attn"
    return name.removesuffix(".__main__")
