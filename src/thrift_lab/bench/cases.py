"""What is timed: decode and prefill cases, grids of them, and the bytes that each decode step must move."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from thrift_attn.config import (
    BLOCK,
    DECODE_ROWS,
    BaseFormat,
    Budget,
    Compute,
    PromotedStorage,
    ThriftConfig,
    check_choice,
)
from thrift_attn.numerics import DecodeNumerics, PrefillNumerics
from thrift_attn.reference.budget import blocks_per_row, promoted_in_decode
from thrift_attn.reference.formats import FORMATS, RESIDUALS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

ConfigName = Literal["default", "paper"]
"""What our side computes: `ThriftConfig` as it is, or `ThriftConfig.paper`, to see what the additions cost in time."""


class Case:
    """What decode and prefill cases have in common; both are frozen dataclasses.

    B ``batch``, Hq ``q_heads``, Hkv ``kv_heads``, D ``head_dim``, ``kv`` tokens of K and V, ``tq`` of Q in each sequence.
    """

    batch: int
    kv: int
    tq: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    budget: str
    config_name: ConfigName

    def _check(self) -> None:
        for name in ("batch", "kv", "q_heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide q_heads, got {self.q_heads}/{self.kv_heads}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        check_choice("config_name", self.config_name, ConfigName)
        Budget.parse(self.budget)

    def _configured(self, **options: Any) -> ThriftConfig:
        make = ThriftConfig if self.config_name == "default" else ThriftConfig.paper
        return make(budget=Budget.parse(self.budget), **options)

    @property
    def group(self) -> int:
        """G, query heads of a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def blocks(self) -> int:
        """N, KV blocks of a sequence, an incomplete one included."""
        return math.ceil(self.kv / BLOCK)

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return 1 / math.sqrt(self.head_dim)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of Q, K, V and the output."""
        return DTYPES[self.dtype]

    @property
    def plain_elements(self) -> int:
        """Elements of K and V together."""
        return 2 * self.batch * self.kv_heads * self.kv * self.head_dim

    @property
    def name(self) -> str:
        """Short name of the shape, such as ``B8 128k 32/8``; head dim, dtype and tq only where they are unusual."""
        length = f"{self.kv // 1024}k" if self.kv % 1024 == 0 else f"{self.kv}"
        rare = [f"D{self.head_dim}"] * (self.head_dim != 128) + [self.dtype] * (self.dtype != "bfloat16")
        rare += [f"Tq{self.tq}"] * (1 < self.tq < self.kv)
        return " ".join([f"B{self.batch} {length} {self.q_heads}/{self.kv_heads}", *rare])

    @property
    def config(self) -> ThriftConfig:
        """What our side computes."""
        raise NotImplementedError

    @property
    def ignored(self) -> list[str]:
        """Options of the configuration that have no effect in it (`thrift_attn.numerics`)."""
        raise NotImplementedError

    @property
    def shape(self) -> Case:
        """The case as a baseline sees it."""
        raise NotImplementedError

    @property
    def promoted_share(self) -> float:
        """Share of the KV blocks that our side promotes, by the rule of its budget; decode counts complete ones."""
        raise NotImplementedError

    @property
    def flops(self) -> int:
        """Multiplications and additions of exact attention."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, kw_only=True)
class DecodeCase(Case):
    """One decode step over a filled KV cache.

    Args:
        batch: B, sequences.
        kv: tokens in the cache of each sequence, the new ones included.
        q_heads: Hq.
        kv_heads: Hkv; divides Hq.
        head_dim: D.
        dtype: ``"bfloat16"`` or ``"float16"``.
        tq: new tokens of each sequence, 1 to 16.
        budget: text that `Budget.parse` reads.
        promoted_storage: how promoted blocks are stored, see `ThriftConfig`.
        config_name: see `ConfigName`.

    Raises:
        ValueError: a number out of range, heads that do not divide, an unknown choice.
    """

    batch: int
    kv: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    tq: int = 1
    budget: str = "0.05"
    promoted_storage: PromotedStorage = "nested"
    config_name: ConfigName = "default"

    def __post_init__(self) -> None:
        self._check()
        if not 1 <= self.tq <= min(DECODE_ROWS, self.kv):
            raise ValueError(f"tq must be in [1, {min(DECODE_ROWS, self.kv)}], got {self.tq}")
        check_choice("promoted_storage", self.promoted_storage, PromotedStorage)

    @property
    def config(self) -> ThriftConfig:
        """What our side computes."""
        return self._configured(base_format="nvfp4", compute="16bit", promoted_storage=self.promoted_storage)

    @property
    def ignored(self) -> list[str]:
        """Options of the configuration that have no effect in a step over pages."""
        return list(DecodeNumerics.resolve(self.config).ignored)

    @property
    def shape(self) -> DecodeCase:
        """The case as a baseline sees it: without budget, configuration and storage of the promoted blocks."""
        return replace(self, budget="0", promoted_storage="nested", config_name="default")

    @property
    def flops(self) -> int:
        """Multiplications and additions of exact attention (the causal corner of ``tq > 1`` counted as visible)."""
        return 4 * self.batch * self.q_heads * self.tq * self.kv * self.head_dim

    @property
    def promoted(self) -> int:
        """Complete KV blocks that a KV head promotes in one step; the incomplete newest one comes on top, in 16 bits."""
        return promoted_in_decode(self.config.budget, self.kv, new_tokens=self.tq)

    @property
    def promoted_share(self) -> float:
        """Share of the complete KV blocks that a KV head promotes."""
        return self.promoted / max(1, self.kv // BLOCK)


@dataclass(frozen=True, kw_only=True)
class PrefillCase(Case):
    """A causal prompt, all of it in one call.

    Args:
        batch: B, sequences.
        kv: tokens of each sequence.
        q_heads: Hq.
        kv_heads: Hkv; divides Hq.
        head_dim: D.
        dtype: ``"bfloat16"`` or ``"float16"``.
        budget: text that `Budget.parse` reads.
        base_format: format of the 4-bit or 8-bit base.
        compute: arithmetic on it, see `ThriftConfig`.
        config_name: see `ConfigName`.

    Raises:
        ValueError: a number out of range, heads that do not divide, an unknown choice.
    """

    batch: int = 1
    kv: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    budget: str = "0.05"
    base_format: BaseFormat = "fp8"
    compute: Compute = "fp4"
    config_name: ConfigName = "default"

    def __post_init__(self) -> None:
        self._check()
        check_choice("base_format", self.base_format, BaseFormat)
        check_choice("compute", self.compute, Compute)

    @property
    def tq(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Queries of a sequence: all of it."""
        return self.kv

    @property
    def config(self) -> ThriftConfig:
        """What our side computes."""
        return self._configured(base_format=self.base_format, compute=self.compute)

    @property
    def ignored(self) -> list[str]:
        """Options of the configuration that have no effect in prefill."""
        return list(PrefillNumerics.resolve(self.config).ignored)

    @property
    def promoted_share(self) -> float:
        """Share of the visible pairs of query and KV blocks that is promoted."""
        seen = torch.arange(1, self.blocks + 1)
        return float(blocks_per_row(self.config.budget, seen, self.blocks).sum() / seen.sum())

    @property
    def shape(self) -> PrefillCase:
        """The case as a baseline sees it: without budget, configuration, format and arithmetic."""
        return replace(self, budget="0", base_format="fp8", compute="fp4", config_name="default")

    @property
    def flops(self) -> int:
        """Multiplications and additions of exact causal attention, half of the square."""
        return 2 * self.batch * self.q_heads * self.kv * self.kv * self.head_dim


def io_bytes(case: Case) -> int:
    """Bytes of Q read and of the output written."""
    return 2 * case.batch * case.q_heads * case.tq * case.head_dim * 2


def plain_bytes(case: Case, element: int) -> int:
    """Bytes that attention over a plain cache must move: K and V once, Q, the output.

    Args:
        case: the case.
        element: bytes of an element of the cache, 2 or 1.
    """
    return case.plain_elements * element + io_bytes(case)


def thrift_bytes(case: DecodeCase) -> dict[str, int]:
    """Bytes that our step must move, by kernel, and for the whole step.

    A kernel's figure counts what passes between kernels; ``step`` does not, since a fused step could keep it on the chip.

    Returns:
        ``scores`` (block centres in, logits of all rows out), ``select`` (logits in, lists out), ``attend`` (base of all
        blocks, residual or 16-bit copy of the promoted ones, logits and lists in), ``merge`` (nothing that must move
        besides the output), ``step``.
    """
    heads = case.batch * case.kv_heads
    rows = case.group * case.tq
    full, tail = divmod(case.kv, BLOCK)
    promoted = case.promoted
    block = 2 * BLOCK * case.head_dim  # elements of K and V in one block
    base = FORMATS[case.config.base_format].bits_per_element(case.head_dim) / 8 * block
    if case.promoted_storage == "16bit":
        stored = (full - promoted) * base + promoted * 2 * block
    else:
        stored = full * base + promoted * RESIDUALS[case.promoted_storage].bits_per_element(case.head_dim) / 8 * block
    stored += tail * 2 * case.head_dim * 2
    centres = full * case.head_dim * 2
    logits = rows * case.blocks * 4
    lists = case.blocks * 4
    io = io_bytes(case)
    return {
        "scores": heads * (centres + logits) + io // 2,
        "select": heads * (logits + lists),
        "attend": heads * int(stored + logits + lists) + io,
        "merge": io // 2,
        "step": heads * int(stored + centres) + io,
    }


def grid(
    *,
    batches: Iterable[int] = (1, 4, 8, 32),
    lengths: Iterable[int] = (8192, 32768, 131072, 524288),
    heads: Iterable[tuple[int, int]] = ((32, 8), (28, 4), (16, 16)),
    **rest: Any,
) -> tuple[DecodeCase, ...]:
    """All combinations, heads outermost, then lengths and batches."""
    lengths, batches = tuple(lengths), tuple(batches)
    return tuple(
        DecodeCase(batch=batch, kv=kv, q_heads=hq, kv_heads=hkv, **rest)
        for hq, hkv in heads
        for kv in lengths
        for batch in batches
    )


TARGET = (
    DecodeCase(batch=8, kv=131072),
    DecodeCase(batch=8, kv=131072, promoted_storage="16bit"),
    DecodeCase(batch=1, kv=131072),
    DecodeCase(batch=1, kv=32768),
)
"""The cases that the project holds itself to."""

PRESETS: dict[str, tuple[DecodeCase, ...]] = {
    "smoke": (DecodeCase(batch=2, kv=4096),),
    "target": TARGET,
    "quick": (*TARGET, DecodeCase(batch=8, kv=32768), DecodeCase(batch=32, kv=32768)),
    "full": tuple(dict.fromkeys((*TARGET, *grid()))),
}


PREFILL_PRESETS: dict[str, tuple[PrefillCase, ...]] = {
    "smoke": (PrefillCase(kv=4096), PrefillCase(kv=4096, base_format="nvfp4")),
    "target": (PrefillCase(kv=65536), PrefillCase(kv=131072), PrefillCase(kv=131072, base_format="nvfp4")),
    "full": (
        *(PrefillCase(kv=2**n, head_dim=dim) for dim in (128, 64) for n in range(12, 20)),
        *(PrefillCase(kv=2**n, base_format="nvfp4") for n in (15, 17)),
        *(PrefillCase(kv=2**n, base_format="mxfp4") for n in (15, 17)),
        *(PrefillCase(kv=2**n, base_format="nvfp4", compute="16bit") for n in (15, 17)),
    ),
}


def prefill_grid(
    lengths: Iterable[int],
    *,
    base_formats: Iterable[str] = ("fp8",),
    computes: Iterable[str] = ("fp4",),
    heads: Iterable[tuple[int, int]] = ((32, 8),),
    budgets: Iterable[str] = ("0.05",),
    config_names: Iterable[str] = ("default",),
    **rest: Any,
) -> tuple[PrefillCase, ...]:
    """All combinations, heads outermost, then lengths, formats, arithmetics, budgets and config_names."""
    lengths, base_formats, computes = tuple(lengths), tuple(base_formats), tuple(computes)
    budgets, config_names = tuple(budgets), tuple(config_names)
    found: list[dict[str, Any]] = [
        {
            "q_heads": hq,
            "kv_heads": hkv,
            "kv": kv,
            "base_format": base_format,
            "compute": compute,
            "budget": budget,
            "config_name": config_name,
            **rest,
        }
        for hq, hkv in heads
        for kv in lengths
        for base_format in base_formats
        for compute in computes
        for budget in budgets
        for config_name in config_names
    ]
    return tuple(PrefillCase(**fields) for fields in found)


_C = TypeVar("_C", bound=Case)


def by_shape(cases: Iterable[_C]) -> dict[Case, list[_C]]:
    """Cases that share their baselines, in order of first appearance."""
    groups: dict[Case, list[_C]] = {}
    for case in cases:
        groups.setdefault(case.shape, []).append(case)
    return groups


def memory_needed(case: Case) -> int:
    """Bytes of device memory a case takes at least.

    Decode: K and V in 16 bits (the float64 check needs them) and the largest cache beside them, which is ours with the base,
    the high plane and the centres of all blocks, or a copy in 8 bits. Prefill: Q, K, V, the output, and Q, K and V again.
    """
    if isinstance(case, PrefillCase):
        return 2 * (2 * case.plain_elements + 3 * case.batch * case.q_heads * case.kv * case.head_dim) + (2 << 30)
    low = FORMATS[case.config.base_format].bits_per_element(case.head_dim)
    high = (
        16
        if case.config.promoted_storage == "16bit"
        else RESIDUALS[case.config.promoted_storage].bits_per_element(case.head_dim)
    )
    ours = (low + high + 16 / 2 / BLOCK) / 8
    return int(case.plain_elements * (2 + max(1.0, ours)) * 1.05) + (1 << 30)
