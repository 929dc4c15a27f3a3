"""``thrift bench e2e``: prefill, first token, decode and memory of a whole model, ours against BF16, in one run."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, Budget, ThriftConfig, fraction
from thrift_attn.interface import attention
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.transformers import ThriftCache, disable, enable
from thrift_attn.transformers.decode_graph import DecodeGraph
from thrift_attn.transformers.generate import prefill
from thrift_lab.bench import e2e_model
from thrift_lab.bench.bench_records import make_context
from thrift_lab.bench.e2e_records import OURS, SIDES, ModelCase, ModelRecord, ModelRow, Side, describe
from thrift_lab.bench.inputs import BIAS, NOISE, TOPIC
from thrift_lab.console import Log

FILL = 8192
"""Tokens written at a time where a cache is filled with random K and V."""

WARM = 4096
"""Tokens of a prompt before the timed one."""

SAMPLE = 16384
"""Tokens from which on every further token costs the same bytes: above the floor of residuals, for shares from 12.5% on."""

SPARE = 1.25 * 2**30
"""Bytes left free beside the weights and the largest cache, for one step."""

BOUNDS = {
    **{"bf16": 0.3, "all": 0.3, "chunks": 0.3, "launched": 1e-3, "residuals launched": 1e-3},
    **{"thrift": float("inf"), "residuals": float("inf")},
}
"""Largest relative distance of logits. A random network of 32 layers amplifies rounding: in emulation BF16 is 0.16 off float32,
and every block from the nested plane 0.08; unrelated logits are 1.4 apart. At 5% the distance is recorded, not judged: the
quality of a random network says nothing."""


@dataclass(frozen=True)
class ModelPlan:
    """What to run.

    Args:
        model: a name of `e2e_model.SHAPES`, or a folder or hub id of transformers.
        cases: in order.
        out: the record's file.
        new: timed decode steps.
        budget: of promoted blocks.
        fused: whether norms, rotary embeddings and gates are fused, on all sides.
        largest: whether to look for the largest context.
        full: tokens of a sequence, of which as many are decoded at once as fit; None to leave that out.
        residual_share: of the side ``residuals``; None to leave it out.
        device: where; times are only meaningful on a CUDA device.
        seed: of weights, prompts and fillings.
        as_is: whether transformers' own step is timed too, on the cases with a prompt.
        check_tokens: tokens of the prompt that `check` compares logits after.
        gpu_memory: GiB that the GPU may be taken to have, so that a larger one stands in for a smaller; None for all of it.
    """

    model: str
    cases: tuple[ModelCase, ...]
    out: Path
    new: int = 32
    budget: Budget = fraction(0.05)
    fused: bool = True
    largest: bool = True
    full: int | None = None
    residual_share: float | None = None
    device: str = "cuda"
    seed: int = 0
    as_is: bool = True
    check_tokens: int = 1500
    gpu_memory: float | None = None

    @property
    def config(self) -> ThriftConfig:
        """Of the cache."""
        return self.config_of("thrift")

    def config_of(self, side: Side) -> ThriftConfig:
        """Of the cache of a side of ours."""
        share = self.residual_share if side == "residuals" and self.residual_share is not None else 1.0
        return ThriftConfig.for_cache(budget=self.budget, residual_share=share)

    @property
    def sides(self) -> tuple[Side, ...]:
        """That are timed on every case."""
        return ("bf16", *OURS) if self.residual_share is not None else ("bf16", "thrift")


class ModelBench:
    """A model, ready to be switched between the sides."""

    def __init__(self, plan: ModelPlan):
        self.plan, self.device = plan, torch.device(plan.device)
        self.cuda = self.device.type == "cuda"
        self.denied = self._deny_memory() if self.cuda and plan.gpu_memory is not None else 0  # bytes that are not used
        dtype = torch.bfloat16 if self.cuda else torch.float32
        self.model = e2e_model.build(plan.model, self.device, dtype, seed=plan.seed)
        self.fused = e2e_model.fuse(self.model) if plan.fused else []
        e2e_model.register_bf16()
        self.weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        text = self.model.config.get_text_config(decoder=True)
        self.layers, self.vocab = text.num_hidden_layers, text.vocab_size
        self.kv_heads = text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def _deny_memory(self) -> int:
        """Keep the allocator to ``gpu_memory`` less what the driver takes; return the bytes of the GPU above that."""
        free, total = torch.cuda.mem_get_info()
        limit = int((self.plan.gpu_memory or 0) * 2**30)
        if not total - free < limit <= total:
            raise ValueError(
                f"gpu_memory must be above what is in use and at most {total / 2**30:.1f} GiB, got {limit / 2**30:g}"
            )
        torch.cuda.set_per_process_memory_fraction((limit - (total - free)) / total)
        return total - limit

    def use(self, side: Side) -> None:
        """Switch the attention."""
        if getattr(self.model.config, "_attn_implementation", None) == "thrift":
            disable(self.model)
        if side in OURS:
            enable(self.model, self.plan.config_of(side))
        else:
            self.model.set_attn_implementation("sdpa" if side == "transformers" else e2e_model.BF16)

    def cache(self, side: Side, slots: int, **options: Any) -> Any:
        """An empty cache for this many slots."""
        if side in OURS:
            return ThriftCache(self.model.config, slots, **{"decode": self.plan.config_of(side), **options})
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=slots)

    def prompt(self, batch: int, length: int) -> Tensor:
        """Random tokens."""
        generator = torch.Generator().manual_seed(self.plan.seed + length)
        return torch.randint(0, self.vocab, (batch, length), generator=generator).to(self.device)

    def fill(self, cache: Any, batch: int, tokens: int) -> None:
        """Random K and V for so many tokens: blocks with a topic, channels with a bias, as the decode benchmark has."""
        dtype = next(self.model.parameters()).dtype
        generator = torch.Generator(self.device).manual_seed(self.plan.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=dtype)

        bias = BIAS * normal(self.kv_heads, 1, self.head_dim)
        empty = normal(batch, self.kv_heads, 0, self.head_dim)
        for layer in cache.layers:
            layer.lazy_initialization(empty, empty)
        for at in range(0, tokens, FILL):
            count = min(FILL, tokens - at)
            topics = TOPIC * normal(batch, self.kv_heads, -(-count // BLOCK), self.head_dim)
            k = NOISE * normal(batch, self.kv_heads, count, self.head_dim) + bias
            k += topics.repeat_interleave(BLOCK, 2)[:, :, :count]
            v = normal(batch, self.kv_heads, count, self.head_dim)
            for layer in cache.layers:
                if isinstance(cache, ThriftCache):
                    layer.update(k, v)
                    layer.settle()  # no attention follows that would write them
                else:
                    layer.keys[:, :, at : at + count], layer.values[:, :, at : at + count] = k, v
                    layer.cumulative_length += count

    def kv_bytes(self, cache: Any) -> int:
        """Bytes that a cache holds."""
        if isinstance(cache, ThriftCache):
            return cache.nbytes()
        return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))

    def warm(self, side: Side, prompt: Tensor) -> None:
        """What a first prompt compiles and looks up: the model at `WARM` tokens, attention at full length.

        Some kernels are compiled anew for another power of two of blocks.
        """
        prefill(self.model, prompt[:, :WARM], self.cache(side, WARM))
        text = self.model.config.get_text_config(decoder=True)
        heads, dtype = text.num_attention_heads, next(self.model.parameters()).dtype
        shape = (prompt.shape[0], prompt.shape[1], self.head_dim)
        q, k, v = (
            torch.randn(shape[0], count, *shape[1:], device=self.device, dtype=dtype)
            for count in (heads, self.kv_heads, self.kv_heads)
        )
        if side in OURS:
            cache = self.cache(side, shape[1])
            attention(q, k, v, config=cache.prefill_on(self.device))
        else:
            e2e_model.bf16_attention(self.model, q, k, v, None)

    def decode(self, cache: Any, position: int, ids: Tensor, steps: int) -> list[float]:
        """Milliseconds of each of ``steps`` steps, each with the most likely token of the one before."""
        step = DecodeGraph(self.model, cache, position=position)
        warm = 3 if self.cuda else 1
        marks: list[Any] = []
        for at in range(warm + steps):
            if at >= warm:
                marks.append(self._mark())
            ids = step(ids).argmax(-1, keepdim=True)
        marks.append(self._mark())
        if not self.cuda:
            return [1e3 * (b - a) for a, b in pairwise(marks)]
        torch.cuda.synchronize()
        if not step.captured:
            raise RuntimeError("the timed steps were not replayed")
        return [a.elapsed_time(b) for a, b in pairwise(marks)]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def fresh(self) -> None:
        """Give memory back and count the peak anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """Most bytes allocated since `fresh`."""
        return torch.cuda.max_memory_allocated() if self.cuda else None


def check(bench: ModelBench, length: int, steps: int = 8) -> dict[str, float]:
    """Logits of the sides after a prompt and some steps, as relative distance from transformers' own.

    Returns:
        ``bf16``: the BF16 baseline's. ``all``: ours with every block promoted, by the same kernels; ``chunks``: likewise,
        with the prompt in chunks; ``launched``: the distance of steps launched one by one from replayed ones. ``thrift``
        and ``residuals``: as timed.

    Raises:
        ValueError: a side that computes something else: above `BOUNDS`, or no finite logits.
    """
    ids = bench.prompt(1, length + steps)
    every = bench.plan.config.with_(budget=fraction(1.0))

    def logits(side: Side, chunk: int | None = None, warmup: int = 1, **options: Any) -> Tensor:
        bench.use(side)
        if side in OURS:  # no prompt is exact because it is short: the check is of what is timed
            decode = options.setdefault("decode", bench.plan.config_of(side))
            options["prefill"] = ThriftConfig(budget=decode.budget, exact_below=0)
        cache = bench.cache(side, length + steps, **options)
        prefill(bench.model, ids[:, :length], cache, chunk=chunk)
        step = DecodeGraph(bench.model, cache, position=length, warmup=warmup)
        found = [step(ids[:, at : at + 1]).float().clone() for at in range(length, length + steps)]
        return torch.cat(found[-1:])  # its cache is full by then, so that every slot is written

    want = logits("transformers", warmup=steps)

    def off(got: Tensor, from_: Tensor) -> float:
        return float((got - from_).norm() / want.norm())

    errors = {
        "bf16": off(logits("bf16"), want),
        "all": off(logits("thrift", decode=every), want),
        "chunks": off(logits("thrift", chunk=length // 2 + 30, decode=every), want),
    }
    for side, name in (("thrift", "launched"), ("residuals", "residuals launched")):
        if side in bench.plan.sides:
            replayed = logits(side)
            errors |= {side: off(replayed, want), name: off(logits(side, warmup=steps), replayed)}
    for name, error in errors.items():
        if not error < BOUNDS[name]:
            raise ValueError(f"{name}: logits are {error:.3f} from those of transformers; nothing is timed")
    return errors


def run(plan: ModelPlan, log: Log = print) -> ModelRecord:
    """Build the model, check, time all cases, and write the record as it grows."""
    began = time.perf_counter()
    bench = ModelBench(plan)
    settings = {
        "model": plan.model,
        "new": plan.new,
        "config": plan.config.to_dict(),
        "residual_share": plan.residual_share,
        "gpu_memory_gib": plan.gpu_memory,
        "ignored": list(DecodeNumerics.resolve(plan.config).ignored),
        "prefill": ThriftCache(bench.model.config, BLOCK, decode=plan.config).prefill_on(bench.device).to_dict(),
        "fused": bench.fused,
        "sides": SIDES,
        "seed": plan.seed,
        "timing": "CUDA graph replays between events" if bench.cuda else "wall clock, no graph",
    }
    record = ModelRecord(context=make_context(settings), model=plan.model)
    log(f"{plan.model}: {bench.weights / 2**30:.1f} GiB of weights after {time.perf_counter() - began:.0f} s")
    record.check = check(bench, plan.check_tokens)
    log("logits off transformers': " + ", ".join(f"{name} {error:.4f}" for name, error in record.check.items()))
    record.save(plan.out)
    work: list[tuple[ModelCase, Side]] = [(case, side) for case in plan.cases for side in plan.sides]
    for case, side in work:
        _add(bench, record, case, side, log)
    for side in plan.sides if plan.largest else ():
        record.largest[side] = largest(bench, side, log)
        record.save(plan.out)
    for side in plan.sides if plan.full else ():
        record.full[side] = full(bench, side, plan.full or 0, log)
        record.save(plan.out)
    for case in plan.cases:
        if plan.as_is and case.prompt:
            _add(bench, record, case, "transformers", log)
    record.context["seconds"] = round(time.perf_counter() - began, 1)
    record.save(plan.out)
    return record


def _add(bench: ModelBench, record: ModelRecord, case: ModelCase, side: Side, log: Log) -> None:
    """Time one side of one case and note it in the record."""
    row = ModelRow(case, side, "failed", weights=bench.weights)
    bench.fresh()
    try:
        with torch.no_grad():
            row = _timed(bench, case, side, row)
    except torch.OutOfMemoryError as error:
        row = replace(row, status="skipped", reason=f"no memory: {str(error).splitlines()[0][:200]}")
    except (RuntimeError, NotImplementedError) as error:
        row = replace(row, reason=f"{type(error).__name__}: {str(error)[:400]}")
    bench.fresh()
    record.rows.append(row)
    record.save(bench.plan.out)
    log(describe(row))


def _timed(bench: ModelBench, case: ModelCase, side: Side, row: ModelRow) -> ModelRow:
    """The steps of transformers' own side start from a filled cache: it would read a prompt as the BF16 side does."""
    steps = bench.plan.new if side != "transformers" else max(4, bench.plan.new // 4)
    held = case.context - steps - 4  # and some for warming up
    bench.use(side)
    cache = bench.cache(side, case.context)
    if case.prompt and side != "transformers":
        prompt = bench.prompt(case.batch, held)
        bench.warm(side, prompt)
        bench.fresh()
        bench.sync()
        began = time.perf_counter()
        logits = prefill(bench.model, prompt, cache)
        bench.sync()
        row = replace(row, prefill_s=time.perf_counter() - began)
        ids = logits.argmax(-1, keepdim=True)
        ids.cpu()
        row = replace(row, first_token_s=time.perf_counter() - began, peak_prefill=bench.peak())
        del logits, prompt
    else:
        bench.fill(cache, case.batch, held)
        ids = bench.prompt(case.batch, 1)
    bench.fresh()
    runs = bench.decode(cache, held, ids, steps)
    return replace(row, status="timed", decode_ms=runs, kv_bytes=bench.kv_bytes(cache), peak_decode=bench.peak())


def largest(bench: ModelBench, side: Side, log: Log) -> dict[str, int | float]:
    """The longest context of one sequence that fits: the cache is filled with random K and V and decoded from."""
    tokens, per_token = _room(bench, side, 4 * BLOCK)
    found = _fit(bench, side, 1, tokens // BLOCK * BLOCK)
    log(f"largest context, {side}: {found['context']:,} tokens, {found['decode_ms']:.2f} ms a token")
    kept = ("kv_bytes", "decode_ms")
    return {"tokens": found["context"], "bytes_per_token": per_token, **{name: found[name] for name in kept}}


def full(bench: ModelBench, side: Side, context: int, log: Log) -> dict[str, int | float]:
    """The most tokens that fit in sequences of at least ``context`` tokens each, decoded at once.

    As many sequences as fit, each as much longer as fills the memory: no sequence is counted in part.

    Args:
        bench: with the model.
        side: whose cache.
        context: least tokens of a sequence.
        log: is told what was found.
    """
    room, per_token = _room(bench, side, 2 * context)
    batch = max(1, room // context)
    found = _fit(bench, side, batch, room // batch // BLOCK * BLOCK)
    tokens = batch * int(found["context"])
    rate = batch / found["decode_ms"] * 1e3
    log(f"full batch, {side}: {batch} x {found['context']:,} tokens, {found['decode_ms']:.2f} ms, {rate:,.0f} tokens/s")
    return {"sequences": batch, "tokens": tokens, "bytes_per_token": per_token, **found, "tokens_per_s": rate}


def _room(bench: ModelBench, side: Side, without: int) -> tuple[int, float]:
    """Tokens that memory has room for, ``without`` where it is not counted, and bytes of each in a long sequence."""
    bench.use(side)
    bench.fresh()
    free = torch.cuda.mem_get_info()[0] - bench.denied if bench.cuda else 0
    held = []
    for tokens in (SAMPLE, 2 * SAMPLE):
        cache = bench.cache(side, tokens)
        bench.fill(cache, 1, 0)
        held.append(bench.kv_bytes(cache))
        del cache
        bench.fresh()
    per_token = (held[1] - held[0]) / SAMPLE
    return (int((free - SPARE) / per_token) if bench.cuda else without), per_token


def _fit(bench: ModelBench, side: Side, batch: int, tokens: int) -> dict[str, int | float]:
    """Sequences of about so many tokens, as long as fit, filled and decoded: see `_held`."""
    for _ in range(6):
        found = _held(bench, side, batch, tokens)
        bench.fresh()
        if found is not None:
            return {"context": tokens, **found}
        tokens = int(0.985 * tokens) // BLOCK * BLOCK
    raise RuntimeError(f"{side}: no {batch} contexts near {tokens:,} tokens fit")


@torch.no_grad()
def _held(bench: ModelBench, side: Side, batch: int, tokens: int) -> dict[str, int | float] | None:
    """Bytes of a cache that holds so many tokens of each sequence, and milliseconds of a step; None without memory for it."""
    try:
        cache = bench.cache(side, tokens)
        bench.fill(cache, batch, tokens - 16)
        runs = bench.decode(cache, tokens - 16, bench.prompt(batch, 1), 8)
    except torch.OutOfMemoryError:
        return None
    peak = {} if (peak := bench.peak()) is None else {"peak": peak}
    return {"kv_bytes": bench.kv_bytes(cache), "decode_ms": statistics.median(runs), **peak}
