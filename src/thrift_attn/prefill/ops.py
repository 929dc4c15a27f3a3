"""Prefill on the device as one torch.library operator: quantise, select, attend. Traces, compiles and captures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS, ThriftConfig
from thrift_attn.dispatch import Form
from thrift_attn.prefill.attend import attend_prefill
from thrift_attn.prefill.pack import quantise_kv, quantise_q
from thrift_attn.prefill.select import (
    capacity,
    select_decode,
    select_rows,
    visible_counts,
    wanted_blocks,
)
from thrift_attn.prefill.statistics import measure
from thrift_attn.reference.budget import asked_share
from thrift_attn.seq_layout import Sequences
from thrift_attn.stats import Stats


@dataclass
class Call:
    """One call of the kernels, stage by stage; arguments as of `prefill_op`. Each stage needs those before it."""

    q: Tensor
    k: Tensor
    v: Tensor
    sequences: Sequences
    wanted: Tensor
    most: int
    decode: bool
    low: str
    form: Form
    quantised: bool
    centred: bool
    sink: bool
    less_mean: bool
    balanced: bool
    rounded: bool
    best: bool
    rest: str | None
    first: int
    last: int
    scale: float
    window: int | None
    softcap: float | None
    mass: bool

    def __post_init__(self) -> None:
        self.q, self.k, self.v = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.q, self.k, self.v))

    def quantise(self) -> None:
        """Q, K and V to packed data; block means."""
        self.levels = measure(
            self.q, self.k, self.v, self.sequences, centred=self.centred, less_mean=self.less_mean,
            balanced=self.balanced, of_values=self.low == "nvfp4",
        )  # fmt: skip
        self.key_bias = None
        if self.less_mean:
            shape = (self.sequences.parts, self.q.shape[1], self.sequences.blocks, 3, BLOCK)
            self.key_bias = torch.empty(shape, dtype=torch.bfloat16, device=self.q.device)
        self.packed = quantise_kv(
            self.k, self.v, self.sequences, low=self.low, form=self.form, rest=self.rest, centred=self.centred,
            sink=self.sink, best=self.best, levels=self.levels, key_bias=self.key_bias,
        )  # fmt: skip
        low = self.low if self.quantised and self.low != "drop" else None
        self.packed_q = quantise_q(
            self.q, self.sequences, low=low, form=self.form, best=self.best, levels=self.levels,
            centres=self.packed.centres if self.sink else None,
        )  # fmt: skip

    def select(self) -> None:
        """Lists of promoted blocks."""
        select, q = (select_decode, self.q) if self.decode else (select_rows, self.packed_q.means)
        self.lists = select(
            q, self.packed.centres, self.sequences, self.wanted, self.most, others=self.packed.others,
            first=self.first, last=self.last, window=self.window,
        )  # fmt: skip

    def _on_hopper(self) -> bool:
        """Whether the kernel written for FP8 on sm_90 serves the call; it does not tell the paths' shares apart."""
        served = self.form == "native" and self.low == "fp8" and self.quantised and self.rest is None
        served = served and not self.decode and self.sequences.lengths is not None and not self.mass
        if not served or torch.cuda.get_device_capability(self.q.device)[0] != 9:
            return False
        from thrift_attn.prefill.sm90_fp8.launch import why_not  # Gluon, which not every Triton has

        return why_not(self.q, self.k, self.v, causal=self.sequences.causal, scale=self.scale) is None

    def attend(self) -> Tensor:
        """Attention; the output."""
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        self.share = torch.empty_like(self.lse) if self.mass else self.lse.new_empty(0)
        if self._on_hopper():
            from thrift_attn.prefill.sm90_fp8.launch import attend_fp8

            packed, packed_q = self.packed, self.packed_q
            attend_fp8(
                self.q, self.k, self.v, packed_q.q, packed_q.q_scale, packed.k, packed.k_scale, packed.v, packed.v_scale,
                packed.centres if self.centred else None, *self.lists, self.out, self.lse,
                scale=self.scale, causal=self.sequences.causal, window=self.window, softcap=self.softcap, sink=packed_q.sink,
            )  # fmt: skip
            return self.out
        attend_prefill(
            self.q, self.k, self.v, self.packed_q, self.packed, *self.lists, self.out, self.lse, self.sequences,
            low=self.low, form=self.form, quantised=self.quantised, centred=self.centred, scale=self.scale,
            key_bias=self.key_bias, values=self.levels.values, rounded=self.rounded, window=self.window, softcap=self.softcap,
            mass=self.share if self.mass else None,
        )  # fmt: skip
        return self.out


@torch.library.custom_op("thrift_attn::prefill", mutates_args=(), device_types=None)
def prefill_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    wanted: Tensor,
    sizes: list[int],
    causal: bool,
    uniform: bool,
    decode: bool,
    low: str,
    form: str,
    quantised: bool,
    centred: bool,
    sink: bool,
    less_mean: bool,
    balanced: bool,
    rounded: bool,
    best: bool,
    rest: str | None,
    first: int,
    last: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    mass: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stages of one call.

    Args:
        q: 16-bit ``[B, Hq, Tq, D]``, or ``[1, Hq, tokens, D]`` for sequences end to end.
        k: ``[B, Hkv, Tk, D]`` likewise.
        v: likewise.
        spans: of `Sequences`.
        wanted: see `wanted_blocks`.
        sizes: of `Sequences`: parts, rows, blocks, most_rows, most_blocks; then K, room in a list of promoted blocks.
        causal: of `Sequences`.
        uniform: all sequences have the lengths of q and k.
        decode: one list per KV head.
        low: format of the low path, or ``"drop"``.
        form: of the packed data.
        quantised: Q and P too.
        centred: quantise K - c_b.
        sink: the first token of a sequence is exact.
        less_mean: quantise Q less its mean over the call.
        balanced: level Q, K and V by powers of two.
        rounded: divide by the sum of P after rounding.
        best: keep the better of the format's scales.
        rest: residual plane of promoted blocks, or None for the 16-bit K and V.
        first: forced first blocks.
        last: forced last blocks.
        scale: factor of the logits.
        window: sliding window in tokens.
        softcap: bound of the logits.
        mass: whether to work out the share of the high path.

    Returns:
        Output (the shape of ``q``), LSE float32 (its first three dimensions), promoted blocks of every row int32
        ``[P, Hq, R]``, and the share of the high path (the shape of the LSE, empty unless asked for).
    """
    *layout, most = sizes
    lengths = (q.shape[2], k.shape[2]) if uniform else None
    sequences = Sequences(spans, *layout, causal=causal, lengths=lengths)
    call = Call(
        q, k, v, sequences, wanted, most, decode, low, "native" if form == "native" else "wide", quantised, centred,
        sink, less_mean, balanced, rounded, best, rest, first, last, scale, window, softcap, mass,
    )  # fmt: skip
    call.quantise()
    call.select()
    out = call.attend()
    return out, call.lse, call.lists[1], call.share


@prefill_op.register_fake
def _(q, k, v, spans, wanted, sizes, causal, uniform, decode, low, form, quantised, centred, sink, less_mean, balanced, rounded,
      best, rest, first, last, scale, window, softcap, mass):  # fmt: skip
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    counts = q.new_empty(sizes[0], q.shape[1], sizes[1], dtype=torch.int32)
    return torch.empty_like(q), lse, counts, lse.new_empty(q.shape[:3] if mass else 0)


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    config: ThriftConfig,
    form: Form,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    mass: bool = False,
    ragged: bool = False,
) -> tuple[Any, ...]:
    """Arguments of `Call` for a `ThriftConfig` that the kernels serve (`thrift_attn.dispatch.check_prefill`).

    With ``ragged`` sequences lie end to end, and every query head has its own lists however few queries there are.
    """
    decode, four = not ragged and q.shape[2] <= DECODE_ROWS, config.four_bit_queries
    least = 1 if config.base_format == "drop" else 0  # a row that attends to nothing has no output
    wanted = wanted_blocks(config.budget, sequences, window=window, least=least, decode=decode)
    most = max(least, capacity(config.budget, sequences.most_blocks))
    return (
        q, k, v, sequences, wanted, most, decode, config.base_format, form, config.compute == "fp4", config.centred,
        config.exact_sink, four and config.center == "all", config.balanced, four and config.normalize == "rounded",
        config.scales == "best", None if config.promoted_storage == "16bit" else config.promoted_storage, config.force_first,
        config.force_last, scale, window, softcap, mass,
    )  # fmt: skip


def prefill(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`prefill_op` with the arguments of `arguments`."""
    q, k, v, sequences, wanted, most, *rest = arguments(*args, **options)
    s: Sequences = sequences
    sizes = [s.parts, s.rows, s.blocks, s.most_rows, s.most_blocks, most]
    return prefill_op(q, k, v, s.spans, wanted, sizes, s.causal, s.lengths is not None, *rest)


def prefill_stats(
    sequences: Sequences, config: ThriftConfig, heads: int, counts: Tensor, share: Tensor, window: int | None
) -> Stats:
    """`Stats` of a call of `prefill`; copies lengths and sums to the host.

    Args:
        sequences: of the call.
        config: of the call.
        heads: Hq.
        counts: promoted blocks of every row, as `prefill` returns them.
        share: share of the high path of every query.
        window: sliding window in tokens.
    """
    spans = sequences.spans.cpu()
    decode = sequences.parts == sequences.batch and int(spans[:, 1].max()) <= DECODE_ROWS
    visible = visible_counts(spans[:, 1], spans[:, 3], sequences.most_rows, decode, sequences.causal, window)
    total = Stats(promoted=0, mass=float(share.sum()))
    for b, (_, queries, _, keys, row, _) in enumerate(spans.tolist()):
        seen = visible[b][visible[b] > 0]
        own = counts[b if sequences.parts == sequences.batch else 0, :, row : row + (1 if decode else len(visible[b]))]
        total += Stats(
            visible=heads * int(seen.sum()),
            promoted=int(own[..., visible[b] > 0].sum()),
            asked=heads * float(asked_share(config.budget, seen, -(-keys // BLOCK)) * seen.sum()),
            rows=heads * (min(queries, keys) if sequences.causal else queries),
        )
    return total
