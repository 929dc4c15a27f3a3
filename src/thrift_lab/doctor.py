"""What ``thrift doctor`` says: versions beside those that are tested, what runs on this device and why, what is cached."""

from __future__ import annotations

import re
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from thrift_attn.config import ThriftConfig
from thrift_attn.dispatch import check_cache, serve, support
from thrift_attn.exact import Call
from thrift_lab.assets import MODELS, SHAKESPEARE, cache_dir, cached
from thrift_lab.extras import missing
from thrift_lab.models import is_cached
from thrift_lab.provenance import device_name, tested_versions, versions

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "gguf", "matplotlib", "datasets")
NEEDED = (("transformers", "hf"), ("pooch", "eval"))
"""Packages without which no command can load a model or a text, and the extras that bring them."""

_PROMPT = 131_072
_COLOURS = {"native": "green", "emulated": "yellow", "no": "red"}


def examine(out: Console) -> list[str]:
    """Print what there is; return what is missing for the commands to run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.print(_versions())
    out.print()
    out.print(_things(device))
    out.print()
    for line in sentences(device):
        out.print(line, highlight=False, markup=False)
    out.print()
    out.print(_features(device))
    out.print()
    out.print(
        "Models: `thrift doctor --models PAGE` checks every family of the transformers that is installed (minutes).",
        highlight=False,
        markup=False,
    )
    problems = [problem for module, extra in NEEDED if (problem := missing(module, extra))]
    try:
        import thrift_attn.transformers.versions  # noqa: F401
    except ImportError as error:  # too old; the error says what is needed
        problems = problems or [str(error)]
    return problems


def verdict(version: str | None, tested: tuple[str, str] | None) -> tuple[str, str]:
    """What to think of an installed version, and a colour for it.

    Args:
        version: of a package; None when it is not there.
        tested: the oldest and the newest minor version that the tests run with, or None where any does.
    """
    if tested is None:
        return "", "default"
    oldest, newest = tested
    words = f"tested: {oldest} to {newest}"
    if version is None:
        return words, "default"
    minor = _minor(version)
    if minor < _minor(oldest):
        return f"older than what is tested ({oldest} to {newest})", "red"
    return (words, "green") if minor <= _minor(newest) else (f"newer than what is {words}", "yellow")


def _minor(version: str) -> tuple[int, ...]:
    """Return major and minor version as numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _plain() -> Table:
    return Table(box=None, show_header=False, padding=(0, 1))


def _versions() -> Table:
    table, tested = _plain(), tested_versions()
    for name, version in versions(PACKAGES).items():
        words, colour = verdict(version, tested.get(name))
        table.add_row(name, version or "[dim]not installed[/dim]", f"[{colour}]{words}[/{colour}]")
    return table


def _things(device: torch.device) -> Table:
    """Device, cache, and what the commands fetch."""
    table = _plain()
    table.add_row("device", device_name(device))
    table.add_row("cache", str(cache_dir()))
    assets: list[tuple[Any, bool]] = [(model, is_cached(name)) for name, model in MODELS.items()]
    for asset, here in [*assets, (SHAKESPEARE, bool(cached(SHAKESPEARE)))]:
        found = "[green]cached[/green]" if here else f"fetched when first used ({asset.megabytes} MB)"
        table.add_row(asset.name, found)
    return table


def sentences(device: torch.device) -> list[str]:
    """Say which path the defaults take on a device, and why none other."""
    call = Call(device=device, dtype=torch.bfloat16, head_dim=128, queries=_PROMPT, keys=_PROMPT)
    found = serve("auto", ThriftConfig(), call)
    if device.type != "cuda":
        return [
            "Here everything runs in plain PyTorch, for its numbers and not for speed: the kernels need a CUDA device of "
            "compute capability 8.0 or newer."
        ]
    config, said = found.config, []
    if found.by == "exact":
        said.append(f"attention() on prompts of {_PROMPT:,} tokens is exact 16-bit attention: {found.why}.")
    elif found.by == "triton":
        below = f"; shorter than {config.exact_below:,} tokens exactly, which is faster" if config.exact_below else ""
        said.append(f"attention() on prompts runs the kernels, {config.base_format} ({found.form} products){below}.")
    else:
        said.append("attention() runs in plain PyTorch, slowly: the kernels need triton and compute capability 8.0.")
    try:
        by = check_cache(ThriftConfig.for_cache(), 128, torch.bfloat16, device)
        said.append(f"Caches run {'the kernels' if by == 'triton' else 'in plain PyTorch'}: nvfp4 pages.")
    except NotImplementedError as error:
        said.append(f"Caches do not run: {error}.")
    return said


def _features(device: torch.device) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for header in ("feature", "status", "why"):
        table.add_column(header)
    for row in support(device):
        colour = _COLOURS.get(row.status, "default")
        table.add_row(row.feature, f"[{colour}]{row.status}[/{colour}]", row.why)
    return table
