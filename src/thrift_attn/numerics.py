"""What a `ThriftConfig` means: options resolved, once, into what the two flows compute.

`ThriftConfig` says what a user asked for and `thrift_attn.config` checks it. This module alone interprets it. References and
launchers read the resolved bundle and never the options, so that they cannot disagree about what an option means. An option
that asks for something the configuration never computes is named in ``ignored``; `thrift doctor` and records print it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from thrift_attn.config import BaseFormat, Budget, PromotedStorage, Score, ThriftConfig

FOUR_BITS = ("nvfp4", "mxfp4")
"""Base formats of 4-bit elements, whose groups share a small scale."""


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What prefill and decode have in common.

    Args:
        base_format: format of the low-precision path; ``"drop"`` leaves out what is not promoted.
        promoted_storage: how promoted blocks are stored.
        residual: format of the residual plane of K and V (a key of `thrift_attn.reference.formats.RESIDUALS`), or None where
            promoted blocks are a 16-bit copy.
        centred: whether K is quantised less the mean c_b of its block, and q.c_b is added in high precision.
        exact_sink: whether the first token of a sequence is attended exactly: its K is the centre of block 0 and its V is in
            no group.
        channel_scales: whether K is quantised times a power of two per channel, and Q divided by it.
        v_head_scales: whether V is quantised times a power of two per KV head; scales of mxfp4 reach everywhere without.
        best_scales: whether every top of the format is tried and each group keeps the better scale.
        budget: how many blocks are promoted.
        score: which blocks are promoted first.
        force_first: this many first blocks come before all others.
        force_last: this many last blocks that a row sees come next; without a causal mask those nearest to the row's own.
        ignored: names of options that ask for something this configuration never computes.
    """

    base_format: BaseFormat
    promoted_storage: PromotedStorage
    residual: Literal["nested", "nested8"] | None
    centred: bool
    exact_sink: bool
    channel_scales: bool
    v_head_scales: bool
    best_scales: bool
    budget: Budget
    score: Score
    force_first: int
    force_last: int
    ignored: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all entries as plain JSON values, for records."""
        return {**asdict(self), "budget": str(self.budget), "ignored": list(self.ignored)}


@dataclass(frozen=True, kw_only=True)
class PrefillNumerics(_Shared):
    """What `thrift_attn.attention` computes, beside what decode shares.

    Args:
        quantise_qp: whether Q and P are rounded to the base format, as low-precision tensor cores do.
        subtract_query_mean: whether Q is quantised less its mean over the call, and what the mean makes of each key is
            added exactly. Only of calls of more than `thrift_attn.config.DECODE_ROWS` queries.
        normalize_rounded: whether the output is divided by the sum of P after rounding; else before.
        min_blocks: blocks that every row promotes whatever its budget: a row that attends to nothing has no output.
        exact_below: which sequences promote every block (`thrift_attn.crossovers.is_exact`); 0 for none.
    """

    quantise_qp: bool
    subtract_query_mean: bool
    normalize_rounded: bool
    min_blocks: int
    exact_below: int

    @property
    def looks_ahead(self) -> tuple[str, ...]:
        """What the rounding of a token takes from tokens after it in the call, in words; empty where it takes nothing.

        Masked logits never enter, but a loss that is measured on whole texts is measured with this help.
        """
        found = ["the mean of all queries"] * self.subtract_query_mean
        found += ["powers of two of K and V"] * self.channel_scales
        found += ["one scale per head of V"] * (self.base_format == "fp8")
        return tuple(found)

    @classmethod
    def resolve(cls, config: ThriftConfig) -> PrefillNumerics:
        """Return what ``config`` means for attention over contiguous K and V."""
        shared, ignored = _shared(config)
        drop = config.base_format == "drop"
        four_bit_qp = config.compute == "fp4" and config.base_format in FOUR_BITS
        if drop and config.compute != "16bit":
            ignored.append("compute")
        if config.center == "all" and not four_bit_qp:
            ignored.append("center")
        if config.normalize == "rounded" and not four_bit_qp:
            ignored.append("normalize")
        if config.residual_share != 1:
            ignored.append("residual_share")
        return cls(
            **shared,
            quantise_qp=config.compute == "fp4" and not drop,
            subtract_query_mean=four_bit_qp and config.center == "all",
            normalize_rounded=four_bit_qp and config.normalize == "rounded",
            min_blocks=int(drop),
            exact_below=config.exact_below or 0,
            ignored=tuple(ignored),
        )


@dataclass(frozen=True, kw_only=True)
class DecodeNumerics(_Shared):
    """What `thrift_attn.cache.PagedThriftCache` stores and computes; Q and P always stay in 16 bits.

    Args:
        residual_share: the share of blocks that keep the plane of promoted ones.
    """

    residual_share: float

    quantise_qp: ClassVar[bool] = False
    subtract_query_mean: ClassVar[bool] = False
    normalize_rounded: ClassVar[bool] = False
    min_blocks: ClassVar[int] = 0
    exact_below: ClassVar[int] = 0

    @classmethod
    def resolve(cls, config: ThriftConfig) -> DecodeNumerics:
        """Return what ``config`` means for a paged cache (`thrift_attn.dispatch.check_cache` says which it serves)."""
        shared, ignored = _shared(config)
        ignored += ["center"] * (config.center == "all") + ["normalize"] * (config.normalize == "rounded")
        return cls(**shared, residual_share=config.residual_share, ignored=tuple(ignored))


def _shared(config: ThriftConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the entries of `_Shared`, and the names of options without effect on them.

    Raises:
        ValueError: a format that is still to be chosen.
    """
    if config.base_format == "auto":
        raise ValueError("base_format='auto' has no numerics: thrift_attn.dispatch says what it means on a device")
    four_bits = config.base_format in FOUR_BITS
    channel_scales = config.smooth == "channel" and four_bits
    best_scales = config.scales == "best" and (four_bits or config.promoted_storage == "nested")
    ignored = []
    if config.smooth == "channel" and not channel_scales:
        ignored.append("smooth")
    if config.scales == "best" and not best_scales:
        ignored.append("scales")
    shared = {
        "base_format": config.base_format,
        "promoted_storage": config.promoted_storage,
        "residual": None if config.promoted_storage == "16bit" else config.promoted_storage,
        "centred": config.center != "none",
        "exact_sink": config.sink_token == "exact",
        "channel_scales": channel_scales,
        "v_head_scales": channel_scales and config.base_format == "nvfp4",
        "best_scales": best_scales,
        "budget": config.budget,
        "score": config.score,
        "force_first": config.force_first,
        "force_last": config.force_last,
    }
    return shared, ignored


def describe_ignored(config: ThriftConfig, numerics: PrefillNumerics | DecodeNumerics) -> list[str]:
    """Return a line for each option that has no effect, for people."""
    what = "in a cache" if isinstance(numerics, DecodeNumerics) else f"with base_format={config.base_format!r}"
    if isinstance(numerics, PrefillNumerics) and config.base_format in FOUR_BITS:
        what = f"with compute={config.compute!r}"
    acts = {"center": " more than center='block'"}
    return [f"{name}={getattr(config, name)!r} does nothing{acts.get(name, '')} {what}" for name in numerics.ignored]
