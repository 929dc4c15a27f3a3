"""What a `ThriftConfig` costs, as a share of 16-bit dense attention; words and units are those of `thrift_lab.eval.cost`."""

from __future__ import annotations

from typing import Literal

from thrift_attn.config import BLOCK, ThriftConfig
from thrift_attn.numerics import DecodeNumerics, PrefillNumerics
from thrift_attn.reference.formats import FORMATS, RESIDUALS
from thrift_lab.eval.rivals.rival import Cost

Hardware = Literal["blackwell", "hopper"]

RATES: dict[Hardware, dict[int, float]] = {"blackwell": {16: 1, 8: 2, 4: 4}, "hopper": {16: 1, 8: 2}}
"""Dense tensor-core rate by operand bits, 16-bit taken as 1 (data sheets of B200 and H100)."""

_CENTRE = 1 / (2 * BLOCK)
_SCORE = 1 / (2 * BLOCK * BLOCK)
_SUMMARY = 1 / (2 * BLOCK)

_SCORES = {"mean": _SCORE, "quest": 2 * _SCORE, "local": 0.0, "fp4": 1 / 8, "oracle": 0.0}
"""Prefill cost of a score: of ``fp4`` half a pair, Q K^T, at a quarter of the time."""

_SUMMARIES = {"mean": _SUMMARY, "quest": 2 * _SUMMARY, "local": 0.0, "fp4": 4.5 / 32, "oracle": 0.0}
"""What decode reads for a score: for ``fp4`` K in nvfp4."""


def prefill_cost(config: ThriftConfig | None, share: float, hardware: Hardware = "blackwell") -> float:
    """Weighted operations of prefill with this share of the blocks promoted, dense 16-bit attention being 1.

    A format that the hardware cannot multiply is widened and runs at the 16-bit rate.
    """
    if config is None:
        return 1.0
    scores = _SCORES[config.score] if 0 < share < 1 else 0.0
    if config.base_format == "drop":
        return share + scores
    bits = 16 if config.compute == "16bit" else FORMATS[config.base_format].element_bits
    low = 1 / RATES[hardware].get(bits, 1.0)
    centre = _CENTRE if PrefillNumerics.resolve(config).centred else 0.0
    return share + (1 - share) * (low + centre) + scores


def decode_cost(config: ThriftConfig | None, share: float, head_dim: int = 128) -> float:
    """Bytes read in a decode step with this share of the blocks promoted, a 16-bit cache being 1."""
    if config is None:
        return 1.0
    summaries = _SUMMARIES[config.score] if 0 < share < 1 else 0.0  # else there is nothing to choose
    if config.base_format == "drop":
        return share + summaries
    base = FORMATS[config.base_format].bits_per_element(head_dim) / 16
    if config.promoted_storage == "16bit":
        more = 1 - base
    else:
        more = RESIDUALS[config.promoted_storage].bits_per_element(head_dim) / 16
    if DecodeNumerics.resolve(config).centred:
        summaries = max(summaries, _SUMMARY)
    return base + share * more + summaries


def stored_share(config: ThriftConfig | None, head_dim: int = 128) -> float:
    """Bytes of a KV cache of this configuration, a 16-bit cache being 1: every token, what is promoted or not."""
    if config is None:
        return 1.0
    summaries = _SUMMARIES["quest" if config.score == "quest" else "mean"]
    if config.base_format == "drop":
        return 1.0 + (summaries if config.score in ("mean", "quest") else 0.0)
    base = FORMATS[config.base_format].bits_per_element(head_dim) / 16
    if config.budget.value == 0 and config.budget.kind in ("fraction", "top_k"):
        return base + (summaries if DecodeNumerics.resolve(config).centred else 0.0)
    if config.promoted_storage == "16bit":
        return 1.0 + base + summaries
    return base + RESIDUALS[config.promoted_storage].bits_per_element(head_dim) / 16 + summaries


def config_cost(config: ThriftConfig, share: float, head_dim: int) -> Cost:
    """All three with this share of the blocks promoted.

    Args:
        config: what is computed.
        share: of the blocks.
        head_dim: D.
    """
    return Cost(prefill_cost(config, share), stored_share(config, head_dim), decode_cost(config, share, head_dim))
