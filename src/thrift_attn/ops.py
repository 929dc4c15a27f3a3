"""Prefill on the device as one torch.library operator: quantise, select, attend. Traces, compiles and captures."""

from __future__ import annotations

import torch
from torch import Tensor

from thrift_attn.attend.prefill import attend_prefill
from thrift_attn.attend.stats import Stats
from thrift_attn.capability import Form
from thrift_attn.config import BLOCK, DECODE_ROWS, ThriftConfig
from thrift_attn.quant.prefill import quantise_kv, quantise_q
from thrift_attn.select.budget import asked_share
from thrift_attn.select.prefill import (
    capacity,
    select_decode,
    select_rows,
    visible_counts,
    wanted_blocks,
)
from thrift_attn.sequences import Sequences


@torch.library.custom_op("thrift_attn::prefill", mutates_args=(), device_types=None)
def prefill_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    wanted: Tensor,
    sizes: list[int],
    causal: bool,
    decode: bool,
    low: str,
    form: str,
    quantised: bool,
    centred: bool,
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
        decode: one list per KV head.
        low: format of the low path, or ``"drop"``.
        form: of the packed data.
        quantised: Q and P too.
        centred: quantise K - c_b.
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
    parts, rows, blocks, most_rows, most_blocks, most = sizes
    sequences = Sequences(spans, parts, rows, blocks, most_rows, most_blocks, causal)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    packed_form: Form = "native" if form == "native" else "wide"
    packed = quantise_kv(k, v, sequences, low=low, form=packed_form, rest=rest, centred=centred, best=best)
    quantise = low if quantised and low != "drop" else None
    packed_q = quantise_q(q, sequences, low=quantise, form=packed_form, best=best)
    if decode:
        lists = select_decode(q, packed.centres, sequences, wanted, most, first=first, last=last, window=window)
    else:
        lists = select_rows(
            packed_q.means, packed.centres, sequences, wanted, most, first=first, last=last, window=window
        )
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    share = torch.empty_like(lse) if mass else lse.new_empty(0)
    attend_prefill(
        q, k, v, packed_q, packed, *lists, out, lse, sequences,
        low=low, form=packed_form, quantised=quantised, centred=centred, scale=scale, window=window, softcap=softcap,
        mass=share if mass else None,
    )  # fmt: skip
    return out, lse, lists[1], share


@prefill_op.register_fake
def _(q, k, v, spans, wanted, sizes, causal, decode, low, form, quantised, centred, best, rest, first, last, scale, window,
      softcap, mass):  # fmt: skip
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    counts = q.new_empty(sizes[0], q.shape[1], sizes[1], dtype=torch.int32)
    return torch.empty_like(q), lse, counts, lse.new_empty(q.shape[:3] if mass else 0)


def prefill(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`prefill_op` for a `ThriftConfig` that the kernels serve (`thrift_attn.capability.check_prefill`).

    With ``ragged`` sequences lie end to end, and every query head has its own lists however few queries there are.
    """
    decode = not ragged and q.shape[2] <= DECODE_ROWS
    least = 1 if config.low == "drop" else 0  # a row that attends to nothing has no output
    wanted = wanted_blocks(config.budget, sequences, window=window, least=least, decode=decode)
    most = max(least, capacity(config.budget, sequences.most_blocks))
    sizes = [sequences.parts, sequences.rows, sequences.blocks, sequences.most_rows, sequences.most_blocks, most]
    return prefill_op(
        q, k, v, sequences.spans, wanted, sizes, sequences.causal, decode, config.low, form, config.math == "fp4",
        config.center == "block", config.scales == "best", None if config.high == "16bit" else config.high,
        config.force_first, config.force_last, scale, window, softcap, mass,
    )  # fmt: skip


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
