"""What a method costs, as a share of 16-bit dense attention, so that methods can be compared at equal cost.

Prefill counts multiplications, each divided by the rate of the tensor cores for its operands (`RATES`; 16-bit is 1). The unit
is a visible pair of a query block and a KV block in 16 bits: 4 * 64 * 64 * D operations. Decode counts bytes read: the unit
is a KV block in 16 bits, 2 * 64 * D * 2 bytes.

    prefill(f) = f / rate_high + (1 - f) / rate_low + centre + scores
    decode(f)  = base + f * more + summaries

    centre     q . c_b of every query: 1/128 of a pair, where K is centred
    scores     mean(Q) . c_b once per pair: 1/8192; Quest has two such products; local and SnapKV have none;
               the oracle is given its scores for nothing
    base       bits of the low format / 16; nothing where blocks are dropped
    more       what a promoted block reads besides: the residual, or a 16-bit copy in place of the base
    summaries  c_b: 1/128; Quest reads a minimum and a maximum: 1/64; SnapKV reads none

Left out, for every method alike: quantising (linear in the tokens), the choice of blocks from their scores, softmax. SnapKV
computes prefill in full, so its prefill costs 1; its decode reads the share that it kept.
"""

from __future__ import annotations

from typing import Literal

from thrift_attn.config import BLOCK, ThriftConfig, fraction
from thrift_attn.numerics import DecodeNumerics, PrefillNumerics
from thrift_attn.reference.formats import FORMATS, RESIDUALS
from thrift_lab.eval.eviction import Eviction
from thrift_lab.eval.methods import Method

Hardware = Literal["blackwell", "hopper"]

RATES: dict[Hardware, dict[int, float]] = {"blackwell": {16: 1, 8: 2, 4: 4}, "hopper": {16: 1, 8: 2}}
"""Dense tensor-core rate by operand bits, 16-bit taken as 1 (data sheets of B200 and H100)."""

_CENTRE = 1 / (2 * BLOCK)
_SCORE = 1 / (2 * BLOCK * BLOCK)
_SUMMARY = 1 / (2 * BLOCK)


def prefill_cost(config: ThriftConfig | None, share: float, hardware: Hardware = "blackwell") -> float:
    """Weighted operations of prefill with this share of the blocks promoted, dense 16-bit attention being 1.

    A format that the hardware cannot multiply is widened and runs at the 16-bit rate.
    """
    if config is None:
        return 1.0
    scores = {"mean": _SCORE, "quest": 2 * _SCORE, "local": 0.0, "oracle": 0.0}[config.score] if 0 < share < 1 else 0.0
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
    summaries = {"mean": _SUMMARY, "quest": 2 * _SUMMARY, "local": 0.0, "oracle": 0.0}[config.score]
    if not 0 < share < 1:
        summaries = 0.0  # nothing to choose
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


def costs(method: Method, share: float | None, head_dim: int = 128) -> tuple[float, float]:
    """Prefill and decode cost of a method.

    Args:
        method: what is computed.
        share: of the blocks that it promoted; None: what its budget asks for, if that is a share.
        head_dim: D.

    Raises:
        ValueError: no share given for a budget that is none.
    """
    if method.evict is not None:
        return 1.0, method.evict.keep
    if method.config is None:
        return 1.0, 1.0
    if share is None:
        if method.config.budget.kind != "fraction":
            raise ValueError(f"the cost of {method.name!r} depends on the length: give the share of blocks it promotes")
        share = method.config.budget.value
    return prefill_cost(method.config, share), decode_cost(method.config, share, head_dim)


def at_equal_cost(kind: Literal["quest", "topk", "local", "snapkv"], to: Method, head_dim: int = 128) -> Method:
    """A baseline with the budget that makes it cost what another method costs.

    Sparse baselines meet its prefill cost (Blackwell rates), SnapKV its decode cost.

    Args:
        kind: the baseline.
        to: a method whose budget is a share.
        head_dim: D.
    """
    prefill, decode = costs(to, None, head_dim)
    if kind == "snapkv":
        keep = round(min(1.0, decode), 4)
        return Method(f"snapkv:keep={keep:g}", None, Eviction(keep))
    config = ThriftConfig.sparse("oracle" if kind == "topk" else kind)
    free = prefill - prefill_cost(config, 0.5) + 0.5  # costs are linear in the share
    budget = fraction(round(min(1.0, max(0.0, free)), 4))
    return Method(f"{kind}:budget={budget}", config.with_(budget=budget))
