"""``thrift bench serve`` and ``thrift eval serve``: the commands."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from thrift_lab.console import Model, errors, kept, numbers, shown, words

speed = typer.Typer()
"""What ``thrift bench`` takes over."""

quality = typer.Typer()
"""What ``thrift eval`` takes over."""

TEXTS = ["shakespeare", "handbook:en-US", "source"]
"""Three kinds of text that can be had without the hub."""


def _json(text: str, option: str) -> dict[str, Any] | None:
    """The JSON object of an option, None where nothing was given."""
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} must be JSON, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{option} must be a JSON object, got {text!r}")
    return found


def end_on_term() -> None:
    """Let a polite end of this process be an exception, so that engines are ended as well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@speed.command(name="serve")
def bench_serve(
    preset: Annotated[
        Literal["full", "small"],
        typer.Option(
            help="What is not given: full is Llama-3.1-8B's shape on a GPU at 8192, 32768 and 131072 tokens, 64 steps, "
            "2 prompts, 90% of the memory; small a tiny model on vLLM's CPU engine at 256 and 512."
        ),
    ] = "full",
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the record; runs of earlier calls stay.")] = Path(
        "bench/serve.json"
    ),
    only: Annotated[
        list[str] | None,
        typer.Option(help="Cells of this call: METHOD, METHOD/LENGTH or METHOD/LENGTH/PART, several after commas."),
    ] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option(help="Time nothing: add the record of another call of the same commit, machine and settings."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="llama-3.1-8b, qwen3-8b (weights made up), or a folder.")] = None,
    methods: Annotated[str, typer.Option(help="Of bf16, fp8, thrift.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of a sequence, after commas.")] = "",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Engines of each method, one method after the other.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed prompts of one sequence.")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Timed steps of one sequence.")] = None,
    chunk: Annotated[int | None, typer.Option(min=64, help="Tokens of a step (max_num_batched_tokens).")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="Most sequences at once (max_num_seqs).")] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, max=1, help="gpu_memory_utilization of each.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(min=1, help="GPUs of an engine.")] = None,
    thrift: Annotated[str, typer.Option(help='Options of thrift as JSON: {"budget": "5%"}.')] = "",
    engine: Annotated[
        str, typer.Option(help='More options of vllm.LLM for all, as JSON: {"compilation_config": {"mode": 0}}.')
    ] = "",
    seconds: Annotated[float | None, typer.Option(help="That an engine may take to start, or for one cell.")] = None,
) -> None:
    """Serving: thrift in vLLM against its FlashAttention with 16-bit and with FP8 pages, correctness first."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    with errors():
        if join:
            if only:
                raise ValueError("--join times nothing, so there is nothing for --only to choose")
            from thrift_lab.serving.serve_records import join as join_records

            console.print(join_records(out, join).table().drawn())
            console.print(f"wrote {out}", style="dim", highlight=False, markup=False)
            return
        from thrift_lab.serving.run_serve import run
        from thrift_lab.serving.serve_plan import plan_of

        plan = plan_of(
            preset,
            out=out,
            model=model,
            methods=tuple(words(methods)) or None,
            lengths=numbers(lengths) or None,
            rounds=rounds,
            repeats=repeats,
            steps=steps,
            chunk=chunk,
            sequences=sequences,
            memory=memory,
            ranks=tensor_parallel,
            thrift=_json(thrift, "--thrift"),
            engine=_json(engine, "--engine"),
            seconds=seconds,
        )
        end_on_term()
        with shown(console) as (log, _):
            record = run(plan, only=words(only), log=kept(console, log))
        console.print()
        console.print(record.table().drawn())
        console.print(f"wrote {plan.out}", style="dim", highlight=False, markup=False)
        bad = [row for row in record.rows if row.ours and row.status in ("wrong", "failed")]
        for row in bad:
            console.print(f"{row.cell.name}, {row.status}: {row.reason}", style="red", highlight=False, markup=False)
        if bad:
            raise typer.Exit(1)


@quality.command(name="serve")
def eval_serve(
    model: Model,
    text: Annotated[list[str], typer.Option(help="A file, or what thrift eval nll takes; several times.")] = TEXTS,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each text.")] = 32768,
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the record; runs of earlier calls stay.")] = Path(
        "eval/served.json"
    ),
    only: Annotated[str, typer.Option(help="Methods of this call, of bf16, fp8, thrift.")] = "",
    chunk: Annotated[int, typer.Option(min=64, help="Tokens of a step (max_num_batched_tokens).")] = 8192,
    memory: Annotated[
        float, typer.Option(min=0.1, max=1, help="gpu_memory_utilization; logits need some beside.")
    ] = 0.6,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs of an engine.")] = 1,
    dtype: Annotated[Literal["bfloat16", "float16"], typer.Option(help="Of weights, K and V.")] = "bfloat16",
    thrift: Annotated[str, typer.Option(help='Options of thrift as JSON: {"budget": "5%"}.')] = "",
    engine: Annotated[str, typer.Option(help="More options of vllm.LLM for all, as JSON.")] = "",
) -> None:
    """Quality through vLLM's engine: the loss of texts over pages of thrift, 16 bits and FP8, paired."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    with errors():
        import numpy as np

        from thrift_lab.eval.nll import chars_needed, windows_of
        from thrift_lab.eval.texts import load_text
        from thrift_lab.extras import need
        from thrift_lab.models import resolve
        from thrift_lab.serving.engine_jobs import has_cpu_engine
        from thrift_lab.serving.engine_process import EngineFailed
        from thrift_lab.serving.served_nll import ServedPlan, evaluate

        end_on_term()
        with shown(console) as (log, _):
            folder, _ = resolve(model, log)
            tokenizer = need("transformers", "hf").AutoTokenizer.from_pretrained(folder)
            texts = [load_text(spec, chars_needed(length, 1), log) for spec in text]
            tokens = np.concatenate([windows_of(tokenizer, one.content, length, 1).numpy() for one in texts])
            plan = ServedPlan(
                model=model, out=out, texts=tuple(one.name for one in texts), chunk=chunk, memory=memory, ranks=tensor_parallel,
                dtype=dtype, thrift=_json(thrift, "--thrift") or {}, engine=_json(engine, "--engine") or {},
            )  # fmt: skip
            try:
                record = evaluate(
                    plan, folder, tokens, on_cpu=has_cpu_engine(), only=words(only), log=kept(console, log)
                )
            except EngineFailed as error:
                raise OSError(f"the engine failed, see {out.with_suffix('.log')}: {error}") from error
        console.print()
        console.print(record.table().drawn())
        console.print(f"wrote {out}", style="dim", highlight=False, markup=False)
