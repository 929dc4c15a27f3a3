"""The whole method in plain PyTorch, exact to the definitions; what every kernel is checked against.

Works on one sequence at a time (a batch is a loop), in chunks of query blocks, so that memory grows with the length and
not with its square. Computes in float32, or in float64 for float64 input.

Shapes: H query heads, Hkv KV heads, G = H / Hkv, T tokens, D head dim, N KV blocks, R query blocks of a chunk,
Q queries and C keys of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS, ThriftConfig
from thrift_attn.reference import quantize as quant
from thrift_attn.reference import scores as score
from thrift_attn.reference.budget import asked_share, blocks_per_row, promote
from thrift_attn.reference.channel_scales import fit, key_bias
from thrift_attn.reference.formats import FORMATS, RESIDUALS, Format
from thrift_attn.stats import Stats

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**30}
"""Size of one [H, Q, C] tensor of a chunk: near the cache on CPU, large enough to fill a GPU."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: causal, sliding window, and where the queries sit."""

    queries: int
    keys: int
    causal: bool
    window: int | None
    decode: bool | None = None  # one list of promoted blocks per KV head; None: for up to `DECODE_ROWS` queries

    @property
    def offset(self) -> int:
        """Position of query 0; negative positions see nothing."""
        return self.keys - self.queries if self.causal else 0

    def bounds(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """First visible key and one past the last visible key of each position."""
        last = (positions + 1).clamp(max=self.keys) if self.causal else torch.full_like(positions, self.keys)
        first = (positions + 1 - self.window).clamp(min=0) if self.window else torch.zeros_like(positions)
        return first, last


@dataclass(frozen=True)
class Planes:
    """K and V of one sequence as the two paths see them: compute dtype ``[Hkv, N * 64, D]``, zero-padded to whole blocks."""

    low_k: Tensor | None  # what the base encodes of K, or of K minus the block mean; None: the low path is dropped
    low_v: Tensor | None
    high_k: Tensor
    high_v: Tensor
    centres: Tensor  # c_b [Hkv, N, D], for scores and, with centring, for the low logits
    query_mean: Tensor | None = None  # [H, D], what Q is quantised less of
    key_bias: Tensor | None = None  # [H, N * 64], what that mean makes of each key, unscaled
    stretch: Tensor | None = None  # [Hkv, D], powers of two: K is quantised times it, Q divided by it
    others: Tensor | None = None  # [Hkv, D], mean of block 0 without token 0, which is then exact wherever its block is
    exact_tail: bool = False  # a cache: the incomplete newest block is exact in both planes and outside of the budget


def build_planes(k: Tensor, v: Tensor, config: ThriftConfig, q: Tensor | None = None) -> Planes:
    """Quantise K and V ``[Hkv, T, D]`` of one sequence into the planes of ``config``.

    Args:
        k: keys.
        v: values.
        config: what is computed.
        q: the queries ``[H, Tq, D]`` that see something, for what ``config`` takes from a call
        (`thrift_attn.reference.channel_scales`);
            None takes nothing from queries.
    """
    work = torch.float64 if k.dtype == torch.float64 else torch.float32
    tokens, pad = k.shape[-2], (0, 0, 0, -k.shape[-2] % BLOCK)
    centres, others = quant.block_means(k).to(work), None
    if config.exact_sink:
        centres[:, 0], others = k[:, 0], quant.mean_of_others(k).to(work)
    k, v = (torch.nn.functional.pad(x.to(work), pad) for x in (k, v))
    if config.base_format == "drop":
        return Planes(None, None, k, v, centres)
    fmt = FORMATS[config.base_format]
    mean = torch.zeros((), dtype=work, device=k.device)
    if config.centred:
        mean = centres[:, :, None].expand(-1, -1, BLOCK, -1).flatten(1, 2).clone()
        mean[:, mean.shape[1] - pad[3] :] = 0  # padding stays zero
    delta, base_v = k - mean, v
    if config.exact_sink:  # dK is 0 as it is
        base_v = v.clone()
        base_v[:, 0] = 0
    found = fit(None if q is None else q.to(work), k[:, :tokens], v[:, :tokens], config)
    bias = None
    if found.mean is not None:
        bias = key_bias(found.mean, k, centres if config.centred else torch.zeros_like(centres))
        bias[:, tokens:] = 0
    one = torch.ones((), dtype=work, device=k.device)
    of_k = one if found.keys is None else found.keys[:, None]
    of_v = one if found.values is None else found.values[:, None, None]
    best = config.scales == "best"
    low_k = quant.roundtrip(delta * of_k, fmt, best=best)
    low_v = quant.roundtrip_head(base_v) if fmt.group is None else quant.roundtrip(base_v * of_v, fmt, -2, best=best)
    high_k, high_v = k, v
    if config.promoted_storage != "16bit":
        plane = RESIDUALS[config.promoted_storage]
        high_k = mean + (low_k + quant.residual(delta * of_k, low_k, plane, best=best)) / of_k
        high_v = (low_v + quant.residual(base_v * of_v, low_v, plane, -2, best=best)) / of_v
        if config.exact_sink:
            high_v[:, 0] = v[:, 0]
    return Planes(low_k / of_k, low_v / of_v, high_k, high_v, centres, found.mean, bias, found.keys, others)


def _round_probabilities(p: Tensor, fmt: Format) -> Tensor:
    """P in [0, 1] through the base format with two-level scaling (paper section 3.3): a fixed factor fills the scale range.

    A block-scaled format keeps no group maximum of P: the fixed factor is its scale.
    """
    assert fmt.p_factor is not None
    scaled = p * fmt.p_factor
    rounded = scaled.to(torch.float8_e4m3fn).to(p.dtype) if fmt.group is None else quant.roundtrip(scaled, fmt)
    return rounded / fmt.p_factor


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
        self, q: Tensor, planes: Planes, config: ThriftConfig, mask: Mask, scale: float, softcap: float | None
    ):
        self.config, self.mask, self.scale, self.softcap = config, mask, scale, softcap
        self.planes = planes
        work = planes.high_k.dtype
        self.skipped = max(0, -mask.offset)  # queries before position 0 see nothing
        self.q = q[:, self.skipped :].to(work)
        self.kv_heads = len(planes.high_k)
        self.positions = torch.arange(self.skipped, mask.queries, device=q.device) + mask.offset
        self.first, self.last = mask.bounds(self.positions)
        self.decode = mask.queries <= DECODE_ROWS if mask.decode is None else mask.decode
        self.blocks = -(-mask.keys // BLOCK)
        # Query blocks are cut at absolute positions, so that each has one diagonal block and chunked prefill cuts alike.
        row = torch.zeros_like(self.positions) if self.decode else self.positions // BLOCK - self.positions[0] // BLOCK
        self.row_of = row  # [Tq] query block of each query
        self.row_sizes = torch.bincount(row)
        self.row_ends = self.row_sizes.cumsum(0)
        ends = torch.stack([self.first[self.row_ends - self.row_sizes], self.last[self.row_ends - 1]])
        index = torch.arange(self.blocks, device=q.device)
        self.visible = (index >= ends[0, :, None] // BLOCK) & (index < -(-ends[1, :, None] // BLOCK))  # [R, N]

    # -- selection ---------------------------------------------------------------------------------------------------

    def _mean_queries(self) -> Tensor:
        """Mean query of each query block ``[H, R, D]``; for decode every query by itself ``[H, Tq, D]``."""
        if self.decode:
            return self.q
        sums = torch.zeros(len(self.q), len(self.row_sizes), self.q.shape[-1], dtype=self.q.dtype, device=self.q.device)
        return sums.index_add_(1, self.row_of, self.q) / self.row_sizes[:, None]

    def _scores(self) -> Tensor:
        """Scores ``[H, R, N]``; for decode one list per KV head, ``[Hkv, 1, N]``."""
        kind = self.config.score
        if kind == "local":
            rows = len(self.row_sizes)
            return score.local_score(self.kv_heads if self.decode else len(self.q), rows, self.blocks, self.q.device)
        if kind == "oracle":
            scores = self._true_mass()
            return scores.unflatten(0, (self.kv_heads, -1)).sum(1) if self.decode else scores
        queries, others = self._mean_queries(), self.planes.others
        if kind == "mean":
            centres = self.planes.centres
            if others is not None:
                centres = torch.cat([others[:, None], centres[:, 1:]], 1)
            scores = score.mean_score(queries, centres, self.scale)
        else:
            keys = self.planes.high_k[:, : self.mask.keys]
            if others is not None:
                keys = torch.cat([others[:, None], keys[:, 1:]], 1)  # no extreme
            scores = score.quest_score(queries, *score.block_extremes(keys), self.scale)
        return scores.unflatten(0, (self.kv_heads, -1)).flatten(1, 2).amax(1, keepdim=True) if self.decode else scores

    def _true_mass(self) -> Tensor:
        """Softmax mass of each (query block, KV block) pair under exact attention, without an exact sink ``[H, R, N]``."""
        mass = torch.zeros(len(self.q), len(self.row_sizes), self.blocks, dtype=self.q.dtype, device=self.q.device)
        for chunk in self._chunks():
            logits = self._masked(self._logits(self.planes.high_k, chunk), chunk)
            weights = logits.softmax(-1)
            if self.planes.others is not None and chunk.b0 == 0:
                weights[..., 0] = 0
            per_block = _by_block(weights).sum(-1)
            rows = self.row_of[chunk.q0 : chunk.q1]
            mass[:, :, chunk.b0 : chunk.b1].index_add_(1, rows, per_block)
        return mass

    def select(self) -> tuple[Tensor, Tensor]:
        """Promoted blocks, bool ``[H, R, N]``, and the number of blocks asked for in a row, summed over rows."""
        visible, blocks, last = self.visible, self.blocks, self.config.force_last
        if self.planes.exact_tail:  # `thrift_attn.reference.budget.promoted_in_decode`
            if self.mask.keys % BLOCK:
                visible = visible.clone()
                visible[:, -1] = False
                last = max(0, last - 1)
            blocks = int(visible.sum(-1).max())
        counts = visible.sum(-1)
        budget = self.config.budget
        asked = asked_share(budget, counts, blocks) * counts.sum()
        wanted = blocks_per_row(budget, counts, blocks)
        if self.config.base_format == "drop":
            wanted = wanted.clamp(min=1)  # a row that attends to nothing has no output
        if not wanted.any():
            return torch.zeros(len(self.q), *visible.shape, dtype=torch.bool, device=self.q.device), asked
        if torch.equal(wanted, counts):
            return visible.expand(len(self.q), -1, -1), asked
        chosen = promote(self._scores(), visible, wanted, first=self.config.force_first, last=last)
        return chosen.repeat_interleave(len(self.q) // len(chosen), 0), asked

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
        config, queries = self.config, self.q[:, chunk.q0 : chunk.q1]
        rounded = queries
        if config.compute == "fp4":
            fmt = FORMATS[config.base_format]
            # A block-scaled format shares the scale of a query block, which starts at a multiple of 64 positions.
            lead = int(self.positions[chunk.q0]) % BLOCK if fmt.group is None else 0
            planes = self.planes
            rest = queries if planes.query_mean is None else queries - planes.query_mean[:, None]
            wide = rest.new_ones(())
            if planes.stretch is not None:
                wide = planes.stretch[:, None].repeat_interleave(len(queries) // self.kv_heads, 0)  # [H, 1, D]
            padded = torch.nn.functional.pad(rest / wide, (0, 0, lead, 0))
            rounded = quant.roundtrip(padded, fmt, best=config.scales == "best")[:, lead:] * wide
        logits = self._against(rounded, low_k[:, self._keys(chunk)])
        if self.planes.key_bias is not None:
            logits += self.planes.key_bias[:, None, self._keys(chunk)]
        if config.centred:
            bias = self._against(queries, self.planes.centres[:, chunk.b0 : chunk.b1])  # q.c_b [H, Q, blocks]
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
        if planes.others is not None and chunk.b0 == 0:  # its logit is exact, since it is the centre of its block
            p_sink = p[..., :1].clone()  # where the block is promoted it is 0 by now
            out = out + self._weighted(p_sink, planes.high_v[:, :1])
            mass += (p_sink / norm).squeeze(-1)
            p[..., 0] = 0
        if self.config.compute == "fp4":
            rounded = _round_probabilities(p, FORMATS[self.config.base_format])
            if self.config.normalize == "rounded" and self.config.four_bit_queries:
                norm = norm + (rounded - p).sum(-1, keepdim=True)
            p = rounded
        return (out + self._weighted(p, planes.low_v[:, keys])) / norm, lse, mass

    def attend(self) -> tuple[Tensor, Tensor, Stats]:
        """Output ``[H, Tq, D]`` and LSE ``[H, Tq]`` in the compute dtype, and statistics."""
        promoted, asked = self.select()
        heads = len(self.q)
        outs = [self.q.new_zeros(heads, self.skipped, self.q.shape[-1])]
        lses = [self.q.new_full((heads, self.skipped), -torch.inf)]
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
            rows=heads * self.q.shape[1],
        )
        return torch.cat(outs, 1), torch.cat(lses, 1), stats


def attend_planes(
    q: Tensor, planes: Planes, config: ThriftConfig, mask: Mask, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, Stats]:
    """One sequence over planes that exist already (a cache).

    Args:
        q: ``[H, Tq, D]``.
        planes: of ``mask.keys`` tokens.
        config: what is computed; its formats and storage only say what the planes hold.
        mask: which keys each query sees.
        scale: factor of the logits.
        softcap: bound of the logits, or None.

    Returns:
        Output ``[H, Tq, D]`` and LSE ``[H, Tq]`` in the dtype of the planes, and `Stats`.
    """
    return _Sequence(q, planes, config, mask, scale, softcap).attend()


def promoted_blocks(q: Tensor, planes: Planes, config: ThriftConfig, mask: Mask, scale: float) -> Tensor:
    """The choice that `attend_planes` makes, bool ``[H, R, N]``: which KV blocks each row of query blocks promotes."""
    return _Sequence(q, planes, config, mask, scale, None).select()[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: ThriftConfig,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Stats]:
    """The method on checked input; see `thrift_attn.attention` for the arguments.

    Returns:
        Output ``[B, Hq, Tq, D]`` in the dtype of ``q``, LSE ``[B, Hq, Tq]`` (natural logarithm; float32, float64 for
        float64 input) and `Stats`.
    """
    lengths = [k.shape[2]] * len(q) if kv_lengths is None else kv_lengths.tolist()
    outs, lses, stats = [], [], Stats()
    for row, length in enumerate(lengths):
        mask = Mask(q.shape[2], length, causal, window)
        planes = build_planes(k[row, :, :length], v[row, :, :length], config, q[row, :, max(0, -mask.offset) :])
        out, lse, row_stats = attend_planes(q[row], planes, config, mask, scale, softcap)
        outs.append(out.to(q.dtype))
        lses.append(lse)
        stats += row_stats
    return torch.stack(outs), torch.stack(lses), stats
