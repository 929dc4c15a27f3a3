"""Prefill on the device as one torch.library operator: quantise, select, attend. Traces, compiles and captures.

The operator's schema is flat. On both sides of it stand bundles (`thrift_attn.prefill.bundles`): `prefill` packs them, and
`prefill_op` unpacks them and hands the results of each stage to the next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS, ThriftConfig
from thrift_attn.crossovers import is_exact
from thrift_attn.dispatch import Form, why_not_sm90_fp8
from thrift_attn.kernels.launcher import on_device_of
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.prefill.attend import attend_prefill
from thrift_attn.prefill.bundles import (
    BlockLists,
    BlockPlan,
    KernelNumerics,
    LogitRules,
    PrefillOutput,
    PrefillTensors,
)
from thrift_attn.prefill.pack import PackedKV, PackedQ, quantise_kv, quantise_q
from thrift_attn.prefill.select import plan_blocks, select_rows, select_shared, visible_counts
from thrift_attn.prefill.statistics import measure
from thrift_attn.reference.budget import asked_share
from thrift_attn.seq_layout import Q_LEN, SeqLayout
from thrift_attn.stats import Stats


class Quantised(NamedTuple):
    """What the first stage writes: packed K and V, packed Q, and the powers of two that V was packed with."""

    kv: PackedKV
    q: PackedQ
    v_head_scale: Tensor | None


def quantise(tensors: PrefillTensors, layout: SeqLayout, numerics: KernelNumerics) -> Quantised:
    """Measure the call, then quantise K and V, and Q."""
    statistics = measure(tensors, layout=layout, numerics=numerics)
    kv = quantise_kv(tensors.k, tensors.v, layout=layout, numerics=numerics, statistics=statistics)
    q = quantise_q(tensors.q, layout=layout, numerics=numerics, statistics=statistics, k_block_mean=kv.k_block_mean)
    return Quantised(kv, q, statistics[2])


def select(
    tensors: PrefillTensors,
    packed: Quantised,
    layout: SeqLayout,
    numerics: KernelNumerics,
    plan: BlockPlan,
    window: int | None,
) -> BlockLists:
    """Choose the promoted blocks."""
    force = {"force_first": numerics.force_first, "force_last": numerics.force_last}
    if plan.shared:
        return select_shared(tensors.q, packed.kv, layout=layout, plan=plan, window=window, **force)
    return select_rows(packed.q.q_block_mean, packed.kv, layout=layout, plan=plan, window=window, **force)


def empty_output(q: Tensor, layout: SeqLayout, high_fraction: bool) -> PrefillOutput:
    """Room for the results of a call. Of sequences end to end, queries that no sequence owns get 0 and LSE -inf."""
    out = torch.zeros_like(q) if layout.end_to_end else torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if layout.end_to_end:
        lse.fill_(-torch.inf)
    fraction = torch.zeros_like(lse) if layout.end_to_end else torch.empty_like(lse)
    return PrefillOutput(out, lse, fraction if high_fraction else lse.new_empty(0))


def on_sm90_fp8(
    tensors: PrefillTensors,
    layout: SeqLayout,
    numerics: KernelNumerics,
    plan: BlockPlan,
    rules: LogitRules,
    *,
    stats: bool,
) -> bool:
    """Return whether the kernel written for FP8 on sm_90 serves the call; it does not tell the paths' shares apart."""
    served = numerics.form == "native" and numerics.base_format == "fp8" and numerics.quantise_qp
    served = served and numerics.residual is None and not plan.shared and layout.lengths is not None and not stats
    if not served or torch.cuda.get_device_capability(tensors.q.device)[0] != 9:
        return False
    return why_not_sm90_fp8(*tensors, causal=layout.causal, scale=rules.scale) is None


def attend(
    tensors: PrefillTensors,
    packed: Quantised,
    lists: BlockLists,
    layout: SeqLayout,
    numerics: KernelNumerics,
    rules: LogitRules,
    *,
    sm90_fp8: bool = False,
    high_fraction: bool = False,
) -> PrefillOutput:
    """Attend, on the kernel of every GPU or, with ``sm90_fp8``, on the one written for FP8 on sm_90."""
    into = empty_output(tensors.q, layout, high_fraction)
    if sm90_fp8:
        from thrift_attn.prefill.sm90_fp8.launch import attend_fp8

        attend_fp8(
            tensors, packed_q=packed.q, packed_kv=packed.kv, lists=lists, rules=rules, causal=layout.causal,
            centred=numerics.centred, into=into,
        )  # fmt: skip
    else:
        attend_prefill(
            tensors, packed_q=packed.q, packed_kv=packed.kv, lists=lists, layout=layout, numerics=numerics, rules=rules,
            into=into, v_head_scale=packed.v_head_scale,
        )  # fmt: skip
    return into


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("thrift_attn::prefill", mutates_args=(), device_types=None)
def prefill_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    wanted: Tensor,
    layout: list[int],
    plan: list[int],
    numerics: list[int],
    scale: float,
    window: int | None,
    softcap: float | None,
    high_fraction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stages of one call.

    Args:
        q: 16-bit ``[B, Hq, Tq, D]``, or ``[1, Hq, tokens, D]`` for sequences end to end.
        k: ``[B, Hkv, Tk, D]`` likewise.
        v: likewise.
        spans: of `SeqLayout`.
        wanted: of `BlockPlan`.
        layout: `SeqLayout.pack`.
        plan: capacity and shared of `BlockPlan`.
        numerics: `KernelNumerics.pack`.
        scale: of `LogitRules`.
        window: of `LogitRules`.
        softcap: of `LogitRules`.
        high_fraction: whether to work out the share of the high path.

    Returns:
        Output (the shape of ``q``), LSE float32 (its first three dimensions), promoted blocks of every row int32
        ``[P, Hq, R]``, and the share of the high path (the shape of the LSE, empty unless asked for).
    """
    tensors = PrefillTensors(*map(_rows_contiguous, (q, k, v)))
    laid, options = SeqLayout.unpack(spans, layout), KernelNumerics.unpack(numerics)
    planned, rules = BlockPlan(wanted, plan[0], bool(plan[1])), LogitRules(scale, window, softcap)
    with on_device_of(q):
        packed = quantise(tensors, laid, options)
        lists = select(tensors, packed, laid, options, planned, window)
        sm90_fp8 = on_sm90_fp8(tensors, laid, options, planned, rules, stats=high_fraction)
        result = attend(tensors, packed, lists, laid, options, rules, sm90_fp8=sm90_fp8, high_fraction=high_fraction)
    return result.out, result.lse, lists.block_counts, result.high_fraction


@prefill_op.register_fake
def _(q, k, v, spans, wanted, layout, plan, numerics, scale, window, softcap, high_fraction):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    counts = q.new_empty(layout[0], q.shape[1], layout[1], dtype=torch.int32)
    return torch.empty_like(_rows_contiguous(q)), lse, counts, lse.new_empty(q.shape[:3] if high_fraction else 0)


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SeqLayout,
    config: ThriftConfig,
    form: Form,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    high_fraction: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`prefill_op` for a `ThriftConfig` that the kernels serve (`thrift_attn.dispatch.check_prefill`).

    In a batch of up to 16 queries each, a KV head has one list of promoted blocks. Of sequences end to end every query head
    has its own lists, however few queries there are.
    """
    numerics = PrefillNumerics.resolve(config)
    shared = not layout.end_to_end and q.shape[2] <= DECODE_ROWS
    plan = plan_blocks(numerics, layout, window=window, shared=shared)
    options = KernelNumerics.of(numerics, form)
    return prefill_op(
        q, k, v, layout.spans, plan.wanted, layout.pack(), [plan.capacity, int(shared)], options.pack(), scale, window,
        softcap, high_fraction,
    )  # fmt: skip


def prefill_stats(
    layout: SeqLayout, config: ThriftConfig, heads: int, counts: Tensor, high_fraction: Tensor, window: int | None
) -> Stats:
    """`Stats` of a call of `prefill`; copies lengths and sums to the host.

    Args:
        layout: of the call.
        config: of the call.
        heads: Hq.
        counts: promoted blocks of every row, as `prefill` returns them.
        high_fraction: share of the high path of every query.
        window: sliding window in tokens.
    """
    spans = layout.spans.cpu()
    shared = not layout.end_to_end and int(spans[:, Q_LEN].max()) <= DECODE_ROWS
    host = SeqLayout.unpack(spans, layout.pack())
    visible = visible_counts(
        host.q_len, host.k_len, layout.max_q_blocks, shared=shared, causal=layout.causal, window=window
    )
    total = Stats(promoted=0, mass=float(high_fraction.sum()))
    for b, (_, queries, _, keys, row, _) in enumerate(spans.tolist()):
        seen = visible[b][visible[b] > 0]
        exact = is_exact(config.exact_below or 0, keys, None if layout.end_to_end else queries)
        own = counts[0 if layout.end_to_end else b, :, row : row + (1 if shared else len(visible[b]))]
        total += Stats(
            visible=heads * int(seen.sum()),
            promoted=int(own[..., visible[b] > 0].sum()),
            asked=heads * float(seen.sum() * (1 if exact else asked_share(config.budget, seen, -(-keys // BLOCK)))),
            rows=heads * (min(queries, keys) if layout.causal else queries),
            exact=heads * int(seen.sum()) if exact else 0,
        )
    return total
