"""``thrift bench fuzz``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from thrift_lab.console import errors, shown


def fuzz(
    operations: Annotated[int, typer.Option(min=1, help="Operations on caches.")] = 2000,
    interrupts: Annotated[int, typer.Option(min=0, help="Interrupts inside of changes.")] = 100,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="End after this.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    device: Annotated[str, typer.Option(help="cpu: plain PyTorch; cuda: kernels.")] = "cpu",
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the record.")] = Path("bench/fuzz.json"),
) -> None:
    """Random operations on the paged cache, checked against a model of what it holds; no GPU needed.

    Interrupts and wrong arguments are among them. The exit code is 1 if a law did not hold.
    """
    console = Console(soft_wrap=True)
    with errors():
        import torch

        from thrift_lab.fuzz.campaign import Campaign

        campaign, threads = Campaign(operations, interrupts, seed, minutes, device), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with shown(console) as (_, progress):
                record = campaign.run(progress, workers=workers)
        finally:
            torch.set_num_threads(threads)
        record.save(out)
        for found in record.findings:
            console.print(f"episode {found.episode}: {found.what}", style="red", highlight=False, markup=False)
        console.print(
            f"{record.operations:,} operations and {record.interrupts:,} interrupts in {record.episodes:,} episodes and "
            f"{record.seconds:,.0f} s: {len(record.findings)} findings; wrote {out}",
            highlight=False,
            markup=False,
        )
        if record.findings:
            raise typer.Exit(1)
