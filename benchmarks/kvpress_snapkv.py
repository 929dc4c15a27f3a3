"""SnapKV as kvpress computes it, kept as a record that our own twin (`thrift_lab.eval.eviction`) is checked against.

kvpress requires transformers < 5.3 and cannot live in one environment with the rest, so it has its own:

    python -m venv kvpress && kvpress/bin/pip install "kvpress>=0.5" pydantic
    PYTHONPATH=src kvpress/bin/python benchmarks/kvpress_snapkv.py

Queries and keys are random numbers of numpy's generator, the same everywhere. kvpress smooths votes by a mean over neighbours,
SnapKV's published runs and our twin by a maximum: the twin is compared with both pooled by the mean, and once without pooling.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
from kvpress import SnapKVPress  # pyright: ignore[reportMissingImports]

from thrift_lab.records import Record, make_context

OUT = Path(__file__).parent / "results" / "cpu" / "kvpress-snapkv.json"
SIZES = {"seed": 0, "q_heads": 6, "kv_heads": 2, "tokens": 300, "head_dim": 32, "window": 32}
KEEP = 0.4


class SnapKVRecord(Record):
    """Tokens that kvpress keeps, for each size of the pool and KV head, ascending."""

    KINDS: ClassVar[tuple[str, ...]] = ("kvpress-snapkv",)

    kind: str = "kvpress-snapkv"
    sizes: dict[str, int]
    keep: float
    kept: dict[int, list[list[int]]]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Return q ``[Hq, T, D]`` and k ``[Hkv, T, D]``, float32."""
    draw = np.random.default_rng(SIZES["seed"])
    shape = (SIZES["tokens"], SIZES["head_dim"])
    q, k = (draw.standard_normal((SIZES[heads], *shape), dtype=np.float32) for heads in ("q_heads", "kv_heads"))
    return torch.from_numpy(2 * q), torch.from_numpy(k)


def kept(kernel: int) -> list[list[int]]:
    """Return the tokens that `SnapKVPress` keeps of each KV head; values are the tokens' own numbers."""
    q, k = inputs()
    every = k.repeat_interleave(SIZES["q_heads"] // SIZES["kv_heads"], 0)
    logits = q @ every.transpose(1, 2) * SIZES["head_dim"] ** -0.5
    future = torch.ones(logits.shape[1:]).triu(1).bool()
    attention = logits.masked_fill(future, -torch.inf).softmax(-1)[None]
    numbers = torch.arange(SIZES["tokens"], dtype=torch.float32)[None, None, :, None].expand(1, *k.shape)
    module = SimpleNamespace(
        config=SimpleNamespace(num_attention_heads=SIZES["q_heads"], num_key_value_heads=SIZES["kv_heads"]),
        head_dim=SIZES["head_dim"],
    )
    press = SnapKVPress(compression_ratio=1 - KEEP, window_size=SIZES["window"], kernel_size=kernel)
    _, values = press.compress(module, torch.zeros(1, SIZES["tokens"], 1), k[None], numbers, attention, {})
    return [sorted(int(x) for x in head[:, 0]) for head in values[0]]


if __name__ == "__main__":
    context = make_context(("torch", "transformers", "kvpress", "numpy"))
    SnapKVRecord(context=context, sizes=SIZES, keep=KEEP, kept={n: kept(n) for n in (1, 7)}).save(OUT)
    print(f"wrote {OUT}")
