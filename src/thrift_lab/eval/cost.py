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

from thrift_attn.config import ThriftConfig, fraction
from thrift_lab.eval.config_cost import config_cost, prefill_cost
from thrift_lab.eval.eviction import Eviction
from thrift_lab.eval.methods import Method
from thrift_lab.eval.rivals.rival import Cost

TYPICAL = 32768
"""Tokens at which a cost that depends on the length is given when none is named."""


def costs(method: Method, share: float | None, head_dim: int = 128, tokens: int = TYPICAL) -> Cost:
    """What a method costs in prefill, to store, and to read in decode.

    Args:
        method: what is computed.
        share: of the blocks that it promoted; None: what its budget asks for, if that is a share.
        head_dim: D.
        tokens: in the cache, for rivals that keep the newest ones as they are.

    Raises:
        ValueError: no share given for a budget that is none.
    """
    if method.evict is not None:
        return Cost(1.0, method.evict.keep, method.evict.keep)
    if method.rival is not None:
        return method.rival.cost(head_dim, tokens, share)
    if method.config is None:
        return Cost(1.0, 1.0, 1.0)
    if share is None:
        if method.config.budget.kind != "fraction":
            raise ValueError(f"the cost of {method.name!r} depends on the length: give the share of blocks it promotes")
        share = method.config.budget.value
    config = method.config
    return config_cost(config, share, head_dim)


def bytes_per_token(cost: Cost, head_dim: int) -> Cost:
    """The cost with ``stored`` and ``read`` in bytes for one token, one layer and one KV head: K and V, 4 D in 16 bits."""
    return Cost(cost.prefill, 4 * head_dim * cost.stored, 4 * head_dim * cost.read)


def at_equal_cost(kind: Literal["quest", "topk", "local", "snapkv"], to: Method, head_dim: int = 128) -> Method:
    """A baseline with the budget that makes it cost what another method costs.

    Sparse baselines meet its prefill cost (Blackwell rates), SnapKV its decode cost.

    Args:
        kind: the baseline.
        to: a method whose budget is a share.
        head_dim: D.
    """
    prefill, _, decode = costs(to, None, head_dim)
    if kind == "snapkv":
        keep = round(min(1.0, decode), 4)
        return Method(f"snapkv:keep={keep:g}", None, Eviction(keep))
    config = ThriftConfig.sparse("oracle" if kind == "topk" else kind)
    free = prefill - prefill_cost(config, 0.5) + 0.5  # costs are linear in the share
    budget = fraction(round(min(1.0, max(0.0, free)), 4))
    return Method(f"{kind}:budget={budget}", config.with_(budget=budget))
