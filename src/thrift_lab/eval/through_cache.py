"""``thrift eval cache``: the loss on a text that goes through the cache, for several shares of blocks that keep a residual.

A prompt in one go attends to K and V just made and says nothing about what a cache stores. So the text goes through the cache
in chunks, each attending to the pages of those before it, and its last tokens one by one through the decode kernels. All shares
see the same tokens, and are compared token by token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from thrift_attn.config import ThriftConfig
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.transformers import ThriftCache, disable, enable
from thrift_attn.transformers.decode_graph import DecodeGraph
from thrift_attn.transformers.versions import cache_keyword
from thrift_lab.console import Log, silent
from thrift_lab.eval.bootstrap import BOOTSTRAP_BLOCK, Interval, between, block_means, paired
from thrift_lab.eval.nll import logits_of, token_nll, windows_of
from thrift_lab.models import Loaded
from thrift_lab.records import Record, make_context
from thrift_lab.sheet import Sheet


class Losses(BaseModel):
    """One way through the windows.

    Args:
        share: of the blocks that keep a residual; None for the model without a cache of ours.
        config: of the cache.
        ignored: options that have no effect in it.
        chunks: nats per token, means over 64 tokens each, of what was chunked.
        steps: likewise of what was decoded token by token.
        kl: mean divergence of the decoded steps from the model without the cache, in nats.
        resident_share: share of the blocks of all layers and KV heads that kept their residual at the end.
        bytes_of_16_bit: bytes of the caches of all layers over those of K and V in 16 bits, everything included.
        seconds: taken.
    """

    share: float | None
    config: dict[str, Any] | None = None
    ignored: list[str] = Field(default_factory=list)
    chunks: list[float] = Field(default_factory=list)
    steps: list[float] = Field(default_factory=list)
    kl: float | None = None
    resident_share: float | None = None
    bytes_of_16_bit: float | None = None
    seconds: float = 0.0

    @property
    def all(self) -> list[float]:
        """Nats per token of all scored tokens, in blocks of 64."""
        return [*self.chunks, *self.steps]

    @classmethod
    def joined(cls, windows: Sequence[Losses]) -> Losses:
        """One way through several windows of the same length: losses one after the other, means of the rest."""

        def mean(name: str) -> float | None:
            found = [getattr(one, name) for one in windows]
            return None if found[0] is None else sum(found) / len(found)

        return windows[0].model_copy(
            update={
                **{name: [x for one in windows for x in getattr(one, name)] for name in ("chunks", "steps")},
                **{name: mean(name) for name in ("kl", "resident_share", "bytes_of_16_bit")},
                "seconds": sum(one.seconds for one in windows),
            }
        )


class ThroughCacheRecord(Record):
    """Losses of one text with several shares of residuals, the first of which the others are compared with."""

    kind: str = "through-cache"
    rows: list[Losses] = Field(default_factory=list)

    def over_first(self, row: Losses, part: str = "all") -> tuple[float, Interval | None]:
        """Nats per token of a row above the first share, and the 95% interval of that (paired bootstrap over 64 tokens).

        Args:
            row: of this record.
            part: ``"all"``, ``"chunks"`` or ``"steps"``.
        """
        first = next(x for x in self.rows if x.share is not None)
        return paired(getattr(row, part), getattr(first, part))

    def table(self) -> Sheet:
        """See `Record.table`."""
        head = ("residuals", "nats", "over the first", "95%", "steps", "95%", "KL", "resident", "of 16 bits")
        found: list[tuple[str, ...]] = []
        for row in self.rows:
            name = "no cache" if row.share is None else f"{row.share:.0%}"
            line = [name, f"{np.mean(row.all):.4f}"]
            for part in ("all", "steps"):
                mean, limits = self.over_first(row, part)
                line += [f"{mean:+.4f}", between(limits) or "-"]
            line.append("-" if row.kl is None else f"{row.kl:.5f}")
            line += ["-" if x is None else f"{x:.1%}" for x in (row.resident_share, row.bytes_of_16_bit)]
            found.append(tuple(line))
        return Sheet(head, found)

    def summary(self) -> list[dict[str, Any]]:
        """Each row over the first share."""
        found = []
        for row in self.rows:
            mean, limits = self.over_first(row)
            found.append({"share": row.share, "nll": float(np.mean(row.all)), "over_first": mean, "interval": limits})
        return found


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats of ``ids`` int64 ``[n]`` under float32 ``logits`` ``[n, V]``."""
    return torch.nn.functional.cross_entropy(logits, ids, reduction="none")


@torch.no_grad()
def _plain(loaded: Loaded, ids: Tensor, steps: int) -> tuple[Losses, Tensor]:
    """The model without a cache, and its log-probabilities ``[steps, V]`` at the decoded tokens."""
    model, start = loaded.model, time.perf_counter()
    hidden = model.base_model(ids).last_hidden_state[0]
    losses, first = token_nll(model, hidden, ids[0]), ids.shape[1] - 1 - steps
    want = logits_of(model, hidden[first:-1]).log_softmax(-1)
    row = Losses(share=None, chunks=block_means(losses[:first]), steps=block_means(losses[first:]))
    row.seconds = time.perf_counter() - start
    return row, want


@torch.no_grad()
def _through(loaded: Loaded, ids: Tensor, config: ThriftConfig, chunk: int, steps: int, want: Tensor) -> Losses:
    """One window through a cache."""
    model, start = loaded.model, time.perf_counter()
    first = ids.shape[1] - 1 - steps
    enable(model)
    try:
        cache = ThriftCache(model.config, ids.shape[1], decode=config)
        options: dict[str, Any] = {cache_keyword(model.base_model): cache, "use_cache": True}
        parts = []
        for at in range(0, first, chunk):
            part = slice(at, min(at + chunk, first))
            hidden = model.base_model(input_ids=ids[:, part], **options).last_hidden_state[0]
            parts.append(_nll(logits_of(model, hidden), ids[0, part.start + 1 : part.stop + 1]))
        step = DecodeGraph(model, cache)
        got = torch.cat([step(ids[:, at : at + 1]).clone() for at in range(first, ids.shape[1] - 1)]).float()
    finally:
        disable(model)
    log_p = got.log_softmax(-1)
    layers = [layer.paged for layer in cache.paged_layers]
    plain = sum(2 * ids.shape[1] * x.kv_heads * x.head_dim * 2 for x in layers)
    return Losses(
        share=config.residual_share,
        config=config.to_dict(),
        ignored=list(DecodeNumerics.resolve(config).ignored),
        chunks=block_means(torch.cat(parts)),
        steps=block_means(_nll(got, ids[0, first + 1 :])),
        kl=float((want.exp() * (want - log_p)).sum(-1).mean()),
        resident_share=sum(x.resident_share() for x in layers) / len(layers),
        bytes_of_16_bit=sum(x.nbytes() for x in layers) / plain,
        seconds=time.perf_counter() - start,
    )


def evaluate(
    loaded: Loaded,
    text: str,
    *,
    config: ThriftConfig,
    shares: tuple[float, ...] = (1.0, 0.15, 0.0),
    length: int = 8192,
    windows: int = 1,
    chunk: int = 64,
    steps: int = 256,
    text_name: str = "",
    log: Log = silent,
) -> ThroughCacheRecord:
    """The first windows of a text with every share.

    Args:
        loaded: model and tokenizer.
        text: at least ``length`` tokens long for each window.
        config: of the cache, but for its share of residuals.
        shares: of the blocks that keep a residual; the others are compared with the first.
        length: tokens of a window.
        windows: how many, one after the other.
        chunk: tokens at a time.
        steps: tokens at the end of each that are decoded one by one.
        text_name: for the record.
        log: called with a line of text after each share.

    Raises:
        ValueError: sizes out of range, no shares, or a text that is too short.
    """
    if not shares or windows < 1:
        raise ValueError(f"expected at least one share of residuals and one window, got {len(shares)} and {windows}")
    if chunk < 1 or not BOOTSTRAP_BLOCK <= steps <= length - 1 - BOOTSTRAP_BLOCK:
        raise ValueError(
            f"expected chunk >= 1 and {BOOTSTRAP_BLOCK} <= steps <= length - {1 + BOOTSTRAP_BLOCK}, got chunk {chunk}, "
            f"steps {steps} and length {length}"
        )
    ids = windows_of(loaded.tokenizer, text, length, windows).to(loaded.model.device)
    record = ThroughCacheRecord(
        context=make_context(
            ("torch", "triton", "transformers"),
            **loaded.described(),
            text=text_name,
            length=length,
            windows=windows,
            chunk=chunk,
            steps=steps,
        )
    )
    rows: list[list[Losses]] = [[] for _ in (None, *shares)]
    for number in range(windows):
        window = ids[number : number + 1]
        plain, want = _plain(loaded, window, steps)
        rows[0].append(plain)
        for share, found in zip(shares, rows[1:], strict=True):
            log(f"window {number + 1}, {share:.0%} of residuals: begins")
            row = _through(loaded, window, config.with_(residual_share=share), chunk, steps, want)
            found.append(row)
            log(f"window {number + 1}, {share:.0%} of residuals: {np.mean(row.all):.4f} nats, {row.seconds:.0f} s")
    record.rows = list(map(Losses.joined, rows))
    return record
