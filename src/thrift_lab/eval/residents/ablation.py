"""``thrift eval residents``: what rules for the residuals of a share lose on a text.

The losses are those of `thrift eval cache` in chunks of 64 tokens, without the cache (`thrift_lab.eval.residents.emulation`).
Every rule sees the same tokens and is compared token by token with the first, which by default keeps all residuals. Losses
differ by thousandths of a nat, less than one window tells apart; the divergence of next-token distributions is finer, and the
error of the outputs of heads finer still. For that all rules are followed at once, through the queries of the first pass.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from thrift_attn.config import BLOCK, Budget, ThriftConfig
from thrift_attn.numerics import DecodeNumerics
from thrift_lab.console import Log, silent
from thrift_lab.eval.bootstrap import Interval, between, block_means, paired
from thrift_lab.eval.nll import LOGITS_AT_ONCE, logits_of, token_nll, windows_of
from thrift_lab.eval.residents.emulation import Followed, emulating
from thrift_lab.eval.residents.rules import Rule
from thrift_lab.models import Loaded
from thrift_lab.records import Record, make_context
from thrift_lab.sheet import Sheet

KL_EVERY = 4
"""Divergence is taken of every fourth token: it costs two products with the output head."""


class RuleLoss(BaseModel):
    """What one rule gave.

    Args:
        rule: which blocks keep their residual.
        error: squared error of the outputs of heads that dropped residuals leave, over that of no residual at all.
        mass: share of the attention to complete blocks that found a residual.
        bytes: of the residuals that are kept at the end, over those of all blocks.
        fetched: residuals that came back from the host, for each chunk and KV head; 0 where none can.
        nll: nats per token, means over 64 tokens each; empty where no pass was made for the rule.
        kl: divergence of the next-token distributions from those of the first rule, in nats, of every fourth token; means over
            64 of these.
        seconds: taken by the pass.
    """

    rule: Rule
    error: float
    mass: float
    bytes: float
    fetched: float = 0.0
    nll: list[float] = Field(default_factory=list)
    kl: list[float] = Field(default_factory=list)
    seconds: float = 0.0


class ResidentsRecord(Record):
    """Losses of one text by rule, the first of which the others are compared with."""

    kind: str = "residents"
    rows: list[RuleLoss] = Field(default_factory=list)

    def over_first(self, row: RuleLoss) -> tuple[float, Interval | None]:
        """Nats per token of a row with a pass above the first, and their 95% interval (paired bootstrap over 64 tokens)."""
        return paired(row.nll, self.rows[0].nll)

    def table(self) -> Sheet:
        """See `Record.table`."""
        found: list[tuple[str, ...]] = []
        for row in self.rows:
            fetched = f"{row.fetched:.2f}" if row.fetched else "-"
            cells = [str(row.rule), f"{row.bytes:.1%}", fetched, f"{row.error:.1%}", f"{row.mass:.1%}", "-", "-", "-"]
            if row.nll:
                mean, limits = self.over_first(row)
                cells[5:7] = f"{np.mean(row.kl):.5f}", f"{mean:+.4f}"
                cells[7] = between(limits) or "-"
            found.append(tuple(cells))
        return Sheet(
            ("rule", "residuals", "fetched", "error left", "mass found", "KL", "nats over the first", "95%"), found
        )

    def summary(self) -> list[dict[str, Any]]:
        """Each row, and over the first where it has a pass of its own."""
        found: list[dict[str, Any]] = []
        for row in self.rows:
            found.append({"rule": str(row.rule), "error": row.error, "mass": row.mass, "bytes": row.bytes})
            if row.nll:
                mean, limits = self.over_first(row)
                found[-1] |= {"over_first": mean, "interval": limits, "kl": float(np.mean(row.kl))}
        return found


def _losses(model: Any, hidden: Tensor, first: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Nats ``[L - 1]`` of ``ids`` ``[L]`` by hidden states ``[L, width]``; the divergence of every fourth from ``first``."""
    rows = max(1, LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
    kl = []
    for mine, theirs in zip(hidden[::KL_EVERY].split(rows), first[::KL_EVERY].split(rows), strict=True):
        want = logits_of(model, theirs).log_softmax(-1)
        kl.append((want.exp() * (want - logits_of(model, mine).log_softmax(-1))).sum(-1))
    return token_nll(model, hidden, ids), torch.cat(kl)


@torch.no_grad()
def evaluate(
    loaded: Loaded,
    text: str,
    *,
    rules: tuple[Rule, ...],
    config: ThriftConfig,
    promoted: Budget | None = None,
    passes: int | None = None,
    length: int = 8192,
    text_name: str = "",
    log: Log = silent,
) -> ResidentsRecord:
    """The first window of a text by every rule.

    Args:
        loaded: model and tokenizer.
        text: at least ``length`` tokens long.
        rules: the others are compared with the first.
        config: of the cache; its share of residuals is left to the rules, its budget to ``promoted``.
        promoted: how many of the blocks that have a residual are read with it; None: all, as in chunks.
        passes: how many of the first rules get a pass of their own; the others are followed through the first, which tells what
            they lose but not what the model makes of it. None: all.
        length: tokens of the window, a multiple of 64.
        text_name: for the record.
        log: called with a line of text after each rule.

    Raises:
        ValueError: no rules, no passes, a length that is no multiple of 64, or a text that is too short.
    """
    if not rules or (passes is not None and passes < 1):
        raise ValueError(f"expected at least one rule and one pass, got {len(rules)} and {passes}")
    if length % BLOCK or length < 2 * BLOCK:
        raise ValueError(f"length must be a multiple of {BLOCK} from {2 * BLOCK} on, got {length}")
    numerics = DecodeNumerics.resolve(config)
    ids = windows_of(loaded.tokenizer, text, length, 1)[0].to(loaded.model.device)
    record = ResidentsRecord(
        context=make_context(
            ("torch", "transformers"),
            **loaded.described(),
            text=text_name,
            length=length,
            config=config.to_dict(),
            promoted=None if promoted is None else str(promoted),
        )
    )
    first: list[Tensor] = []
    for i, rule in enumerate(rules[:passes]):
        start = time.perf_counter()
        with emulating(loaded.model, rule, numerics, promoted, beside=() if i else rules) as followed:
            hidden = loaded.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        if not i:
            first.append(hidden)
            record.rows += [_followed(one) for one in followed[1:]]
        nll, kl = _losses(loaded.model, hidden, first[0], ids)
        row = record.rows[i]
        row.nll, row.kl, row.seconds = block_means(nll), block_means(kl), time.perf_counter() - start
        mean, _ = record.over_first(row)
        log(f"{rule}: {mean:+.4f} nats over the first, KL {np.mean(row.kl):.5f}, {row.seconds:.0f} s")
    return record


def _followed(one: Followed) -> RuleLoss:
    """The row of a rule that was followed through the pass of the first."""
    return RuleLoss(
        rule=one.rule,
        error=one.error / one.most if one.most else 0.0,
        mass=one.found / one.mass if one.mass else 1.0,
        bytes=one.share * one.rule.plane_share,
        fetched=one.fetched / max(1, sum(layer.numel() for layer in one.residents)),
    )
