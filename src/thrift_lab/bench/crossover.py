"""``thrift bench crossover``: from which length on thrift is faster than exact 16-bit attention on this GPU.

Whole calls as `thrift_attn.attention` gets them, heads before tokens; the default budget; no dispatch. Methods take turns in
three rounds, so that a GPU that slows down slows all of them. A method whose output is wrong has no times.
The record is the source of a row of `thrift_attn.crossovers.CROSSOVERS`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from thrift_attn import exact
from thrift_attn.config import ThriftConfig
from thrift_attn.crossovers import Server, is_exact
from thrift_attn.dispatch import prefill_config
from thrift_attn.exact import Call
from thrift_attn.interface import attend
from thrift_lab.bench.bench_records import PACKAGES
from thrift_lab.bench.cases import PrefillCase
from thrift_lab.bench.check import SLACK_OURS, SLACK_THEIRS, Rounding, attention64
from thrift_lab.bench.inputs import make_inputs
from thrift_lab.console import Log
from thrift_lab.records import Record, make_context
from thrift_lab.sheet import Sheet

Side = Literal["thrift", "FlashAttention-3", "SDPA"]

DIMS = (128, 64)
PROMPTS = (512, 1024, 2048, 4096, 6144, 8192, 10240, 12288, 14336, 16384, 20480, 24576, 32768)
"""Tokens of whole prompts."""

CHUNKS = (17, 256, 1024, 2048, 3072, 4096, 6144, 8192)
"""Queries of chunks that end a sequence of `CHUNKED` keys."""

CHUNKED = 65536
ROUNDS = 3
SMALLEST = 1024
"""Crossovers are rounded up to multiples of this."""


class Shape(BaseModel, frozen=True):
    """A causal call of one sequence: ``queries`` that end ``keys``.

    Args:
        head_dim: D.
        queries: Tq.
        keys: Tk.
        q_heads: Hq.
        kv_heads: Hkv.
    """

    head_dim: int
    queries: int
    keys: int
    q_heads: int = 32
    kv_heads: int = 8

    def __str__(self) -> str:
        return f"D {self.head_dim}, {self.queries:,} queries of {self.keys:,} keys"


class CrossoverRow(BaseModel):
    """One method on one shape.

    Args:
        shape: of the call.
        side: the method.
        rounds_us: microseconds of the replays of each round; empty if it has not been timed.
        first_ms: milliseconds of the first call of the shape, which may compile or plan.
        error: relative distance from float64 on one KV head; None if it is not finite.
        allowed: largest error that passes.
        promoted: share of the visible blocks that thrift promotes; 1 for exact attention.
        reason: why there are no times.
    """

    shape: Shape
    side: Side
    rounds_us: list[list[float]] = Field(default_factory=list)
    first_ms: float = 0.0
    error: float | None = None
    allowed: float = 0.0
    promoted: float = 1.0
    reason: str = ""

    @property
    def us(self) -> float | None:
        """Median over the rounds of their medians; None without times."""
        return statistics.median(map(statistics.median, self.rounds_us)) if self.rounds_us else None


class CrossoverRecord(Record):
    """What a run measured on one GPU."""

    kind: str = "crossover"
    base_format: str = ""
    rows: list[CrossoverRow] = Field(default_factory=list)

    def times(self, head_dim: int, side: Side, *, chunks: bool = False) -> dict[int, float]:
        """Microseconds by keys of whole prompts, or by queries of chunks."""
        found: dict[int, float] = {}
        for row in self.rows:
            shape = row.shape
            asked = row.side == side and shape.head_dim == head_dim and (shape.queries < shape.keys) == chunks
            if asked and row.us is not None:
                found[shape.queries] = row.us
        return found

    def crossover(self, head_dim: int, server: Server, *, chunks: bool = False) -> int | None:
        """From how many tokens on thrift is faster than exact attention by ``server``, at every longer length too.

        Between the last length at which it is not and the next the line is straight in logarithms. Rounded up to a multiple
        of `SMALLEST`; None if it is not faster at the longest, or nothing was timed.
        """
        ours, theirs = self.times(head_dim, "thrift", chunks=chunks), self.times(head_dim, server, chunks=chunks)
        return crossing([(n, ours[n] / theirs[n]) for n in sorted(ours.keys() & theirs.keys())])

    def table(self) -> Sheet:
        """See `Record.table`: microseconds of each method on each shape, and what follows."""
        sides: tuple[Side, ...] = get_args(Side)
        times = {(row.shape, row.side): row.us for row in self.rows}
        found = []
        for shape in dict.fromkeys(row.shape for row in self.rows):
            us = [times.get((shape, side)) for side in sides]
            best = min((x for x in us[1:] if x), default=None)
            ratio = f"{best / us[0]:.2f}x" if best and us[0] else ""
            found.append((str(shape), *("-" if x is None else f"{x:,.1f}" for x in us), ratio))
        title = f"{self.base_format} on {self.context['machine']['gpu']}: us a call"
        return Sheet(("shape", *sides, "over exact"), found, title, "\n".join(conclusions(self)))

    def head_dims(self) -> list[int]:
        """Head dims in the order of the run."""
        return list(dict.fromkeys(row.shape.head_dim for row in self.rows))


def crossing(ratios: Sequence[tuple[int, float]]) -> int | None:
    """Where ratios of times by length fall below 1 for good, rounded up to a multiple of `SMALLEST`; None if they do not."""
    slow = [at for at, (_, ratio) in enumerate(ratios) if ratio > 1]
    if not ratios or (slow and slow[-1] == len(ratios) - 1):
        return None
    if not slow:
        return 0
    (low, above), (high, below) = ratios[slow[-1]], ratios[slow[-1] + 1]
    way = math.log(above) / (math.log(above) - math.log(below))
    return math.ceil(low * (high / low) ** way / SMALLEST) * SMALLEST


def shapes(dims: Iterable[int] = DIMS) -> list[Shape]:
    """All shapes of a run, whole prompts first."""
    found: list[Shape] = []
    for dim in dims:
        found += [Shape(head_dim=dim, queries=n, keys=n) for n in PROMPTS]
        found += [Shape(head_dim=dim, queries=n, keys=CHUNKED) for n in CHUNKS]
    return found


def tensors(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Q ``[1, Hq, Tq, D]``, K and V ``[1, Hkv, Tk, D]`` of the prefill benchmark, contiguous."""
    case = PrefillCase(
        kv=shape.keys,
        q_heads=shape.q_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=str(dtype).removeprefix("torch."),
    )
    inputs = make_inputs(case, device=device, seed=seed)
    k, v = (x[0][:, : shape.keys].transpose(1, 2).contiguous() for x in (inputs.k, inputs.v))
    return inputs.q[0][:, :, shape.keys - shape.queries :].contiguous(), k, v


NEVER = ThriftConfig(exact_below=0)
"""The default without dispatch."""


def call_of(side: Side, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """The whole call of a method."""
    if side == "thrift":
        return lambda: attend(q, k, v, config=NEVER).out
    scale = q.shape[3] ** -0.5
    return lambda: exact.attend_exact(q, k, v, causal=True, scale=scale, by=side)[0]


def why_absent(side: Side, q: Tensor, k: Tensor) -> str | None:
    """Why a method is not there; None if it is."""
    call = Call(device=q.device, dtype=q.dtype, head_dim=q.shape[3], queries=q.shape[2], keys=k.shape[2])
    if side == "FlashAttention-3" and exact.exact_server(call) != side:
        return "FlashAttention-3 is not installed, or not for this GPU and dtype"
    return None


def check(out: Tensor, side: Side, q: Tensor, k: Tensor, v: Tensor) -> tuple[float | None, float]:
    """Error of an output against float64 on its last KV head, and the largest that passes.

    Our side may be `SLACK_OURS` times as far off as the reference of its configuration, or as 16-bit attention if that is more;
    exact attention `SLACK_THEIRS` times as far as float64 attention with P in 16 bits.
    """
    group, scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    own = q[:, -group:], k[:, -1:], v[:, -1:]
    parts = [slice(at, at + 1024) for at in range(0, q.shape[2], 1024)]

    def wide(rounding: Rounding) -> list[Tensor]:
        found = []
        for part in parts:
            rows = own[0][0, :, part]
            seen = k.shape[2] - q.shape[2] + part.start + rows.shape[1]
            found.append(attention64(rows, own[1][0, 0, :seen], own[2][0, 0, :seen], scale=scale, rounding=rounding))
        return found

    want = wide(Rounding())
    size = sum(float(x.square().sum()) for x in want)

    def error(found: Iterable[Tensor]) -> float:
        return (sum(float((a.double() - b).square().sum()) for a, b in zip(found, want, strict=True)) / size) ** 0.5

    rounded = error(x.to(q.dtype) for x in wide(Rounding(p=q.dtype)))
    allowed = SLACK_THEIRS * rounded
    if side == "thrift":  # where every block is promoted, it is 16-bit attention
        reference = attend(*own, config=NEVER, backend="reference").out
        allowed = SLACK_OURS * max(rounded, error(reference[0, :, part] for part in parts))
    if not bool(out.isfinite().all()):
        return None, allowed
    return error(out[0, -group:, part] for part in parts), allowed


def measure(
    shape: Shape, device: torch.device, *, replays: int, timer: Callable[..., list[float]]
) -> list[CrossoverRow]:
    """All methods on one shape: checked, then timed in turns.

    Args:
        shape: of the call.
        device: where.
        replays: timed replays of a round.
        timer: takes a call and ``replays`` and returns microseconds of each.
    """
    q, k, v = tensors(shape, device, torch.bfloat16)
    rows: dict[Side, CrossoverRow] = {}
    calls: dict[Side, Callable[[], Tensor]] = {}
    for side in get_args(Side):
        rows[side] = row = CrossoverRow(shape=shape, side=side)
        if reason := why_absent(side, q, k):
            row.reason = reason
            continue
        call = call_of(side, q, k, v)
        try:
            started = time.perf_counter()
            out = call()
            _wait(device)
            row.first_ms = 1e3 * (time.perf_counter() - started)
            row.error, row.allowed = check(out, side, q, k, v)
        except (RuntimeError, NotImplementedError) as problem:
            row.reason = f"{type(problem).__name__}: {str(problem)[:300]}"
            continue
        if row.error is None or row.error > row.allowed:
            row.reason = f"wrong: error {row.error}, allowed {row.allowed:.2e}"
            continue
        if side == "thrift":
            row.promoted = promoted(shape)
        calls[side] = call
    for _ in range(ROUNDS):
        for side, call in calls.items():
            rows[side].rounds_us.append(timer(call, replays))
    return list(rows.values())


def promoted(shape: Shape) -> float:
    """Share of the visible blocks of a call that the default budget promotes."""
    from thrift_attn.reference.budget import blocks_per_row

    first, last = (shape.keys - shape.queries) // 64, -(-shape.keys // 64)
    seen = torch.arange(first + 1, last + 1)
    return float(blocks_per_row(NEVER.budget, seen, last).sum() / seen.sum())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def replayed(call: Callable[[], Tensor], replays: int) -> list[float]:
    """Microseconds of a call in replays of a CUDA graph."""
    from thrift_lab.bench.timing import time_steps

    return time_steps([call], replays=replays, warmup=1)[0]


def run(out: Path, *, dims: Sequence[int] = DIMS, replays: int = 7, log: Log = print) -> tuple[CrossoverRecord, Path]:
    """Measure all shapes on the current GPU and write the record as it grows.

    Args:
        out: folder of the record, which is named after the GPU.
        dims: head dims.
        replays: timed replays of a round.
        log: called with a line about each shape.

    Returns:
        The record and its path.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    context = make_context(PACKAGES, settings={"rounds": ROUNDS, "replays": replays, "budget": str(NEVER.budget)})
    prompt = Call(device=device, dtype=torch.bfloat16, head_dim=dims[0], queries=CHUNKED, keys=CHUNKED)
    record = CrossoverRecord(context=context, base_format=prefill_config(NEVER, prompt).base_format)
    path = out / (torch.cuda.get_device_name(device).lower().replace(" ", "-") + ".json")
    for shape in shapes(dims):
        record.rows += measure(shape, device, replays=replays, timer=replayed)
        record.save(path)
        log(describe(record.rows[-len(get_args(Side)) :]))
    return record, path


def describe(rows: Sequence[CrossoverRow]) -> str:
    """One line about a shape."""
    told = (f"{row.side} {row.us:,.0f} us" if row.us is not None else f"{row.side}: {row.reason}" for row in rows)
    return f"{rows[0].shape}: {', '.join(told)}"


def conclusions(record: CrossoverRecord) -> list[str]:
    """What follows for `thrift_attn.crossovers`, a line each."""
    found = []
    for dim in record.head_dims():
        for server in get_args(Server):
            keys = record.crossover(dim, server)
            queries = record.crossover(dim, server, chunks=True)
            if not record.times(dim, server):
                continue
            told = "thrift is not faster at any length" if keys is None else f"exact below {keys:,} keys"
            few = "none" if queries is None else f"{queries:,} queries"
            found.append(f"D {dim}, {server}: {told}; chunks of {CHUNKED:,} keys: thrift is faster from {few} on")
            worst = worst_ratio(record, dim, server, keys)
            if worst is not None:
                found.append(f"D {dim}, {server}: with that, the worst is {worst:.2f} of the speed of exact attention")
    return found


def worst_ratio(record: CrossoverRecord, dim: int, server: Server, keys: int | None) -> float | None:
    """The lowest speed over that of exact attention of all timed calls, when those are exact that dispatch names."""
    if keys is None:
        return None
    found = []
    for chunks in (False, True):
        ours, theirs = (record.times(dim, side, chunks=chunks) for side in ("thrift", server))
        for queries in ours.keys() & theirs.keys():
            call = Call(
                device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=dim, queries=queries,
                keys=CHUNKED if chunks else queries,
            )  # fmt: skip
            dispatched = call.is_prompt_for(server) and is_exact(keys, call.keys, queries)
            found.append(1.0 if dispatched else theirs[queries] / ours[queries])
    return min(found, default=None)
