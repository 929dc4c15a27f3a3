"""The whole method in plain PyTorch, exact to the definitions; what every kernel is checked against.

Works on one sequence at a time (a batch is a loop), in chunks of query blocks, so that memory grows with the length and
not with its square. Computes in float32, or in float64 for float64 input.

Shapes: H query heads, Hkv KV heads, G = H / Hkv, T tokens, D head dim, N KV blocks, R query blocks of a chunk,
Q queries and C keys of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS
from thrift_attn.crossovers import is_exact
from thrift_attn.numerics import DecodeNumerics, PrefillNumerics
from thrift_attn.reference import quantize as quant
from thrift_attn.reference.budget import asked_share, blocks_per_row, promote
from thrift_attn.reference.formats import FORMATS, Format
from thrift_attn.reference.planes import Planes, build_planes
from thrift_attn.reference.scores import SCORES, ScoreInputs
from thrift_attn.stats import Stats

Numerics = PrefillNumerics | DecodeNumerics

Rounding = Callable[[Tensor], Tensor]

Wanted = Callable[[Tensor, Tensor], Tensor]
"""From scores ``[H, R, N]`` and visibility ``[R, N]`` to the number of promoted blocks ``[H, R]``, in place of a budget."""

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**30}
"""Size of one [H, Q, C] tensor of a chunk: near the cache on CPU, large enough to fill a GPU."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query of one sequence sees.

    Args:
        queries: Tq.
        keys: Tk.
        causal: whether a query sees only keys up to its own position.
        window: a query at position p sees keys j with |p - j| < window; None for all.
        decode: whether a KV head has one list of promoted blocks; None: for up to `DECODE_ROWS` queries.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    decode: bool | None = None

    @property
    def offset(self) -> int:
        """Position of query 0: queries are right-aligned with the keys, so it may be negative."""
        return self.keys - self.queries

    @property
    def hidden(self) -> int:
        """How many first queries see nothing, since causal queries before position 0 have no keys."""
        return max(0, -self.offset) if self.causal else 0

    def bounds(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """First visible key and one past the last visible key of each position; equal where there is none."""
        first, last = torch.zeros_like(positions), torch.full_like(positions, self.keys)
        if self.causal:
            last = (positions + 1).clamp(max=self.keys)
        if self.window is not None:
            first = (positions + 1 - self.window).clamp(min=0)
            last = last.minimum(positions + self.window)
        return first, last.maximum(first)


def _round_probabilities(p: Tensor, fmt: Format) -> Tensor:
    """P in [0, 1] through the base format with two-level scaling (paper section 3.3): a fixed factor fills the scale range.

    A block-scaled format keeps no group maximum of P: the fixed factor is its scale.
    """
    assert fmt.p_factor is not None
    scaled = p * fmt.p_factor
    rounded = scaled.to(torch.float8_e4m3fn).to(p.dtype) if fmt.group is None else quant.roundtrip(scaled, fmt)
    return rounded / fmt.p_factor


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _by_block(x: Tensor) -> Tensor:
    """View of ``[H, Q, C]`` as ``[H, Q, blocks, 64]``."""
    return x.unflatten(-1, (-1, BLOCK))


@dataclass(frozen=True)
class _Chunk:
    """A run of whole query blocks: queries [q0, q1) and the KV blocks [b0, b1) that any of them sees."""

    rows: slice  # of query blocks
    q0: int
    q1: int
    b0: int
    b1: int


class _Sequence:
    """One sequence: its planes, its query blocks and the chosen blocks."""

    def __init__(
        self,
        q: Tensor,
        planes: Planes,
        numerics: Numerics,
        mask: Mask,
        scale: float,
        softcap: float | None,
        wanted: Wanted | None = None,
    ):
        self.wanted = wanted
        self.numerics, self.mask, self.scale, self.softcap = numerics, mask, scale, softcap
        self.planes = planes
        self.q = q[:, mask.hidden :].to(planes.high_k.dtype)
        self.kv_heads = len(planes.high_k)
        self.decode = mask.queries <= DECODE_ROWS if mask.decode is None else mask.decode
        # Packed end to end (``decode=False``), few queries are nothing special.
        self.exact = is_exact(numerics.exact_below, mask.keys, None if mask.decode is False else mask.queries)
        self.blocks = -(-mask.keys // BLOCK)
        index = torch.arange(mask.hidden, mask.queries, device=q.device)
        positions = index + mask.offset
        self.first, self.last = mask.bounds(positions)
        # Causal query blocks are cut at absolute positions, so that each has one diagonal block and chunked prefill cuts alike.
        self.cut_at = positions if mask.causal else index
        row = torch.zeros_like(index) if self.decode else self.cut_at // BLOCK - self.cut_at[0] // BLOCK
        self.row_of = row  # [Tq] query block of each query
        self.row_sizes = torch.bincount(row)
        self.row_ends = self.row_sizes.cumsum(0)
        self.own = (positions[self.row_ends - 1] // BLOCK).clamp(0, self.blocks - 1)  # [R] block of a row's last query
        begin, end = self.first[self.row_ends - self.row_sizes, None], self.last[self.row_ends - 1, None]
        block = torch.arange(self.blocks, device=q.device)
        self.visible = (block >= begin // BLOCK) & (block < -(-end // BLOCK)) & (begin < end)  # [R, N]

    # -- selection ---------------------------------------------------------------------------------------------------

    def _mean_queries(self) -> Tensor:
        """Mean query of each query block ``[H, R, D]``; for decode every query by itself ``[H, Tq, D]``."""
        if self.decode:
            return self.q
        sums = torch.zeros(len(self.q), len(self.row_sizes), self.q.shape[-1], dtype=self.q.dtype, device=self.q.device)
        return sums.index_add_(1, self.row_of, self.q) / self.row_sizes[:, None]

    def _scores(self) -> Tensor:
        """Scores ``[H, R, N]``; for decode one list per KV head, ``[Hkv, 1, N]``."""
        means, keys, block0_mean = (
            self.planes.k_block_mean,
            self.planes.high_k[:, : self.mask.keys],
            self.planes.block0_mean,
        )
        if block0_mean is not None:  # an exact first token says nothing about its block
            means = torch.cat([block0_mean[:, None], means[:, 1:]], 1)
            keys = torch.cat([block0_mean[:, None], keys[:, 1:]], 1)
        given = ScoreInputs(self._mean_queries(), means, keys, self.own, self.scale, self._true_mass)
        score = SCORES[self.numerics.score]
        scores = score.of(given)
        if not self.decode:
            return scores
        per_kv_head = scores.unflatten(0, (self.kv_heads, -1)).flatten(1, 2)
        return per_kv_head.sum(1, keepdim=True) if score.in_decode == "sum" else per_kv_head.amax(1, keepdim=True)

    def _true_mass(self, rounded_q: Rounding = _as_it_is, rounded_k: Rounding = _as_it_is) -> Tensor:
        """Softmax mass of each (query block, KV block) pair under exact attention, without an exact sink ``[H, R, N]``."""
        queries, keys = rounded_q(self.q), rounded_k(self.planes.high_k)
        mass = torch.zeros(len(self.q), len(self.row_sizes), self.blocks, dtype=self.q.dtype, device=self.q.device)
        for chunk in self._chunks():
            logits = self._against(queries[:, chunk.q0 : chunk.q1], keys[:, self._keys(chunk)])
            logits = self._masked(self._cap(logits * self.scale), chunk)
            weights = logits.softmax(-1)
            if self.planes.block0_mean is not None and chunk.b0 == 0:
                weights[..., 0] = 0
            per_block = _by_block(weights).sum(-1)
            rows = self.row_of[chunk.q0 : chunk.q1]
            mass[:, :, chunk.b0 : chunk.b1].index_add_(1, rows, per_block)
        return mass

    def select(self) -> tuple[Tensor, Tensor]:
        """Promoted blocks, bool ``[H, R, N]``, and the number of blocks asked for in a row, summed over rows."""
        numerics, visible, blocks, last = self.numerics, self.visible, self.blocks, self.numerics.force_last
        if self.planes.exact_tail:  # `thrift_attn.reference.budget.promoted_in_decode`
            if self.mask.keys % BLOCK:
                visible = visible.clone()
                visible[:, -1] = False
                last = max(0, last - 1)
            blocks = int(visible.sum(-1).max())
        counts = visible.sum(-1)
        if self.exact:
            return visible.expand(len(self.q), -1, -1), counts.sum()
        if self.wanted is not None:
            scores = self._scores()
            by_head = self.wanted(scores, visible)
            promoted = promote(scores, visible, by_head, first=numerics.force_first, last=last, own=self.own)
            return promoted.repeat_interleave(len(self.q) // len(promoted), 0), by_head.double().mean(0).sum()
        asked = asked_share(numerics.budget, counts, blocks) * counts.sum()
        wanted = blocks_per_row(numerics.budget, counts, blocks).clamp(min=numerics.min_blocks).minimum(counts)
        if not wanted.any():
            return torch.zeros(len(self.q), *visible.shape, dtype=torch.bool, device=self.q.device), asked
        can = visible[None]  # [1, R, N]
        if self.planes.resident is not None:  # [Hkv, R, N]
            can = can & self.planes.resident[:, None]
            wanted = wanted.minimum(can.sum(-1))
        if torch.equal(wanted.expand(can.shape[:2]), can.sum(-1)):
            promoted = can
        else:
            first = numerics.force_first
            promoted = promote(self._scores(), visible, wanted, first=first, last=last, own=self.own, can=can)
        return promoted.repeat_interleave(len(self.q) // len(promoted), 0), asked

    # -- attention ---------------------------------------------------------------------------------------------------

    def _chunks(self) -> Iterator[_Chunk]:
        """Chunks of query blocks whose [H, Q, C] tensor stays under `CHUNK_BYTES`."""
        limit = CHUNK_BYTES.get(self.q.device.type, CHUNK_BYTES["cpu"]) // (self.q.element_size() * len(self.q))
        ends = self.row_ends.tolist()
        visible = self.visible.int()
        firsts = visible.argmax(-1).tolist()
        lasts = (self.blocks - visible.flip(-1).argmax(-1)).tolist()
        start = 0
        while start < len(ends):
            stop = start + 1
            q0 = ends[start - 1] if start else 0
            while stop < len(ends) and (ends[stop] - q0) * (lasts[stop] - firsts[start]) * BLOCK <= limit:
                stop += 1
            yield _Chunk(slice(start, stop), q0, ends[stop - 1], firsts[start], lasts[stop - 1])
            start = stop

    def _keys(self, chunk: _Chunk) -> slice:
        return slice(chunk.b0 * BLOCK, chunk.b1 * BLOCK)

    def _against(self, queries: Tensor, keys: Tensor) -> Tensor:
        """``[H, Q, D]`` against ``[Hkv, C, D]`` without expanding the KV heads: ``[H, Q, C]``."""
        grouped = queries.unflatten(0, (self.kv_heads, -1)).flatten(1, 2)
        return (grouped @ keys.mT).view(len(self.q), queries.shape[1], -1)

    def _weighted(self, p: Tensor, values: Tensor) -> Tensor:
        """``[H, Q, C]`` times ``[Hkv, C, D]``: ``[H, Q, D]``."""
        grouped = p.unflatten(0, (self.kv_heads, -1)).flatten(1, 2)
        return (grouped @ values).view(len(self.q), p.shape[1], -1)

    def _logits(self, keys: Tensor, chunk: _Chunk) -> Tensor:
        return self._cap(self._against(self.q[:, chunk.q0 : chunk.q1], keys[:, self._keys(chunk)]) * self.scale)

    def _low_logits(self, low_k: Tensor, chunk: _Chunk) -> Tensor:
        numerics, queries, planes = self.numerics, self.q[:, chunk.q0 : chunk.q1], self.planes
        rounded = queries
        if numerics.quantise_qp:
            fmt = FORMATS[numerics.base_format]
            # A block-scaled format shares the scale of a query block, which starts at a multiple of 64.
            lead = int(self.cut_at[chunk.q0]) % BLOCK if fmt.group is None else 0
            delta = queries if planes.query_mean is None else queries - planes.query_mean[:, None]
            k_scale = delta.new_ones(())
            if planes.k_channel_scale is not None:  # [H, 1, D]
                k_scale = planes.k_channel_scale[:, None].repeat_interleave(len(queries) // self.kv_heads, 0)
            padded = torch.nn.functional.pad(delta / k_scale, (0, 0, lead, 0))
            rounded = quant.roundtrip(padded, fmt, best=numerics.best_scales)[:, lead:] * k_scale
        logits = self._against(rounded, low_k[:, self._keys(chunk)])
        if planes.key_bias is not None:
            logits += planes.key_bias[:, None, self._keys(chunk)]
        if numerics.centred:
            bias = self._against(queries, planes.k_block_mean[:, chunk.b0 : chunk.b1])  # q.c_b [H, Q, blocks]
            _by_block(logits).add_(bias.unsqueeze(-1))
        return self._cap(logits.mul_(self.scale))

    def _cap(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else (logits / self.softcap).tanh_() * self.softcap

    def _masked(self, logits: Tensor, chunk: _Chunk) -> Tensor:
        keys = torch.arange(self._keys(chunk).start, self._keys(chunk).stop, device=logits.device)
        first, last = self.first[chunk.q0 : chunk.q1, None], self.last[chunk.q0 : chunk.q1, None]
        return logits.masked_fill_((keys < first) | (keys >= last), -torch.inf)

    def _attend_chunk(self, chunk: _Chunk, promoted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output ``[H, Q, D]``, LSE ``[H, Q]`` and mass of the high path ``[H, Q]`` of one chunk."""
        planes, keys = self.planes, self._keys(chunk)
        mask = promoted[:, chunk.rows, chunk.b0 : chunk.b1]
        visible = self.visible[chunk.rows, chunk.b0 : chunk.b1]
        any_high = bool(mask.any())
        any_low = planes.low_k is not None and not bool((mask | ~visible).all())
        rows = self.row_of[chunk.q0 : chunk.q1] - chunk.rows.start
        high = mask[:, rows].unsqueeze(-1)  # [H, Q, blocks, 1]
        if planes.low_k is None or planes.low_v is None or not any_low:
            logits = self._logits(planes.high_k, chunk)
            if planes.low_k is None:
                _by_block(logits).masked_fill_(~high, -torch.inf)
        else:
            logits = self._low_logits(planes.low_k, chunk)
            if any_high:
                exact = self._logits(planes.high_k, chunk)
                logits = torch.where(high, _by_block(exact), _by_block(logits)).flatten(-2)
        logits = self._masked(logits, chunk)
        peak = logits.amax(-1, keepdim=True)
        p = logits.sub_(torch.where(peak == -torch.inf, 0, peak)).exp_()
        total = p.sum(-1, keepdim=True)
        lse = (peak + total.log()).squeeze(-1)
        norm = torch.where(total == 0, 1, total)
        if planes.low_v is None or not any_low:
            return self._weighted(p, planes.high_v[:, keys]) / norm, lse, (total / norm).squeeze(-1)
        out, mass = torch.zeros((), dtype=p.dtype, device=p.device), torch.zeros_like(lse)
        if any_high:
            p_high = (_by_block(p) * high).flatten(-2)
            out = self._weighted(p_high, planes.high_v[:, keys])
            mass = (p_high.sum(-1, keepdim=True) / norm).squeeze(-1)
            _by_block(p).masked_fill_(high, 0)
        if planes.block0_mean is not None and chunk.b0 == 0:  # its logit is exact, since it is the centre of its block
            p_sink = p[..., :1].clone()  # where the block is promoted it is 0 by now
            out = out + self._weighted(p_sink, planes.high_v[:, :1])
            mass += (p_sink / norm).squeeze(-1)
            p[..., 0] = 0
        if self.numerics.quantise_qp:
            rounded = _round_probabilities(p, FORMATS[self.numerics.base_format])
            if self.numerics.normalize_rounded:
                norm = norm + (rounded - p).sum(-1, keepdim=True)
            p = rounded
        return (out + self._weighted(p, planes.low_v[:, keys])) / norm, lse, mass

    def attend(self) -> tuple[Tensor, Tensor, Stats]:
        """Output ``[H, Tq, D]`` and LSE ``[H, Tq]`` in the compute dtype, and statistics."""
        promoted, asked = self.select()
        heads = len(self.q)
        outs = [self.q.new_zeros(heads, self.mask.hidden, self.q.shape[-1])]
        lses = [self.q.new_full((heads, self.mask.hidden), -torch.inf)]
        mass = self.q.new_zeros(())
        for chunk in self._chunks():
            out, lse, chunk_mass = self._attend_chunk(chunk, promoted)
            outs.append(out)
            lses.append(lse)
            mass += chunk_mass.sum()
        stats = Stats(
            visible=heads * int(self.visible.sum()),
            promoted=int(promoted.sum()),
            asked=heads * float(asked),
            mass=float(mass),
            rows=heads * int((self.first < self.last).sum()),
            exact=heads * int(self.visible.sum()) if self.exact else 0,
        )
        return torch.cat(outs, 1), torch.cat(lses, 1), stats


def attend_planes(
    q: Tensor,
    planes: Planes,
    numerics: Numerics,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    wanted: Wanted | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """Attend to one sequence over planes that exist already (a cache).

    Args:
        q: ``[H, Tq, D]``.
        planes: of ``mask.keys`` tokens.
        numerics: what is computed; its formats and storage only say what the planes hold.
        mask: which keys each query sees.
        scale: factor of the logits.
        softcap: bound of the logits, or None.
        wanted: how many blocks are promoted where the scores shall say so; None for the budget of ``numerics``.

    Returns:
        Output ``[H, Tq, D]`` and LSE ``[H, Tq]`` in the dtype of the planes, and `Stats`.
    """
    return _Sequence(q, planes, numerics, mask, scale, softcap, wanted).attend()


class Span(NamedTuple):
    """Where one sequence of a call lies: queries ``q[part, :, q0:q1]``, keys and values ``k[part, :, k0:k1]``."""

    part: int
    q0: int
    q1: int
    k0: int
    k1: int


def batch_spans(q: Tensor, k: Tensor, kv_lengths: Tensor | None) -> list[Span]:
    """Return the spans of a batch ``[B, H, T, D]`` whose sequence b has ``kv_lengths[b]`` keys, or all of them."""
    lengths = [k.shape[2]] * len(q) if kv_lengths is None else kv_lengths.tolist()
    return [Span(b, 0, q.shape[2], 0, length) for b, length in enumerate(lengths)]


def packed_spans(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[Span]:
    """Return the spans of sequences end to end ``[1, H, tokens, D]``, from their starts and the end of the last."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [Span(0, *queries, *keys) for queries, keys in zip(pairwise(q), pairwise(k), strict=True)]


def promoted_blocks(q: Tensor, planes: Planes, numerics: Numerics, mask: Mask, scale: float) -> Tensor:
    """The choice that `attend_planes` makes, bool ``[H, R, N]``: which KV blocks each row of query blocks promotes."""
    return _Sequence(q, planes, numerics, mask, scale, None).select()[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numerics: PrefillNumerics,
    spans: Sequence[Span],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    decode: bool | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """Attend to the sequences of a call, one by one, on checked input.

    Args:
        q: ``[P, Hq, Tq, D]``.
        k: ``[P, Hkv, Tk, D]``.
        v: the shape of ``k``.
        numerics: what is computed.
        spans: where the sequences lie; queries of none give 0 and LSE -inf, and so do those of a sequence without keys.
        causal: see `thrift_attn.attention`, also for the following.
        scale: factor of the logits.
        window: sliding window in tokens.
        softcap: bound of the logits.
        decode: see `Mask`.

    Returns:
        Output ``[P, Hq, Tq, D]`` in the dtype of ``q``, LSE ``[P, Hq, Tq]`` (natural logarithm; float32, float64 for
        float64 input) and `Stats`.
    """
    out, stats = torch.zeros_like(q), Stats()
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for part, q0, q1, k0, k1 in spans:
        if q0 == q1 or k0 == k1:
            continue
        queries, keys, values = q[part, :, q0:q1], k[part, :, k0:k1], v[part, :, k0:k1]
        mask = Mask(q1 - q0, k1 - k0, causal, window, decode)
        planes = build_planes(keys, values, numerics, queries[:, mask.hidden :])
        found = attend_planes(queries, planes, numerics, mask, scale, softcap)
        out[part, :, q0:q1], lse[part, :, q0:q1] = found[0].to(q.dtype), found[1]
        stats += found[2]
    return out, lse, stats
