"""Prefill: the float64 check of sampled rows, our call and its stages, and the kernels that people use today."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thrift_attn.config import BLOCK, ThriftConfig, top_k
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.reference.formats import FORMATS
from thrift_lab.bench.baselines import BF16, FP8, fa3_module, import_module
from thrift_lab.bench.cases import Case, PrefillCase
from thrift_lab.bench.check import Reference, Rounding
from thrift_lab.bench.inputs import Inputs
from thrift_lab.bench.timing import Step
from thrift_lab.bench.variants import Absent, Launch, Method, Variant

SMALL_KV = 1000
"""Tokens of the small case of the check: odd, with an incomplete block."""

SAMPLED_HEADS, SAMPLED_ROWS = 2, 4
"""Heads and query rows (64 queries) of each that are compared on the timed case, first and last row included."""


def _spread(total: int, most: int) -> list[int]:
    """``most`` of ``range(total)``, evenly spaced with both ends."""
    count = min(total, most)
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})


@dataclass
class PrefillReference(Reference):
    """Float64 results of sampled query rows. A sample is (sequence, KV head, row of 64 queries) with all heads of the group.

    A row stands alone: it sees the keys up to its end, and its share of the budget is a number of blocks.
    """

    @classmethod
    def of(cls, inputs: Inputs, *, whole: bool) -> PrefillReference:
        """Reference of all rows of, or of `SAMPLED_ROWS` rows of, `SAMPLED_HEADS` KV heads."""
        case = inputs.case
        heads = _spread(case.batch * case.kv_heads, SAMPLED_HEADS)
        rows = _spread(case.blocks, case.blocks if whole else SAMPLED_ROWS)
        samples = [(*divmod(head, case.kv_heads), row) for head in heads for row in rows]
        part = "all" if whole else f"{len(rows)} x 64"
        where = f"{part} queries of {len(heads)} of {case.batch * case.kv_heads} KV heads of {case.name}"
        return cls(inputs, where, samples)

    def _queries(self, row: int) -> slice:
        return slice(row * BLOCK, min((row + 1) * BLOCK, self.inputs.case.kv))

    def _operands(self, sample: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q [G, up to 64, D], and k and v [T, D] up to the last of these queries."""
        b, h, row = sample
        case, inputs, rows = self.inputs.case, self.inputs, self._queries(row)
        group = slice(h * case.group, (h + 1) * case.group)
        return inputs.q[0][b, group, rows], inputs.k[0][b, : rows.stop, h], inputs.v[0][b, : rows.stop, h]

    def _found(self, out: Tensor, sample: tuple[int, ...]) -> Tensor:
        b, h, row = sample
        group = self.inputs.case.group
        return out[b, h * group : (h + 1) * group, self._queries(row)]

    def _reference(self, sample: tuple[int, ...], config: ThriftConfig) -> Tensor:
        """Our reference on one row, with the number of blocks that the whole call gives it."""
        from thrift_attn.reference import attention as reference
        from thrift_attn.reference.budget import blocks_per_row

        q, k, v = self._operands(sample)
        blocks = self.inputs.case.blocks
        wanted = blocks_per_row(config.budget, torch.arange(1, blocks + 1), blocks)[sample[2]]
        own = PrefillNumerics.resolve(config.with_(budget=top_k(int(wanted))))
        mask = reference.Mask(q.shape[1], len(k), True, None, decode=False)
        b, h, _ = sample
        every = self.inputs.q[0][b, h * self.inputs.case.group : (h + 1) * self.inputs.case.group]
        planes = reference.build_planes(k[None], v[None], own, every)  # their mean is that of the call
        out, _, _ = reference.attend_planes(q, planes, own, mask, self.inputs.case.scale)
        return out.to(q.dtype)


# --- our side --------------------------------------------------------------------------------------------------------


def method(case: PrefillCase) -> Method:
    """The row of our method for the format and budget of a case."""
    quantised = f"{case.base_format} Q, K, V, P" if case.compute == "fp4" else f"16-bit Q, {case.base_format} K, V"
    rare = [case.compute] * (case.compute != "fp4") + [case.config_name] * (case.config_name != "default")
    return Method(
        name=" ".join(["thrift", case.base_format, case.budget, *rare]),
        kind="thrift",
        package="thrift-attn",
        precision=f"{quantised}, 16-bit for {case.budget} of the blocks",
        computes=case.config,
        bytes=_bytes(2),
        bytes_per_token=lambda case: 0.0,
        variants=lambda case: [Variant("quantise, select, attend", partial(_steps, case.config))],
        launches=partial(_stages, case.config),
    )


def _heads_first(inputs: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v ``[B, H, T, D]``, contiguous; copied outside the timing."""
    kv = inputs.case.kv
    return [
        (q, k[:, :kv].transpose(1, 2).contiguous(), v[:, :kv].transpose(1, 2).contiguous())
        for q, k, v in zip(inputs.q, inputs.k, inputs.v, strict=True)
    ]


def _steps(config: ThriftConfig, inputs: Inputs) -> list[Step]:
    """The public call on every input set."""
    from thrift_attn.interface import attention

    scale = inputs.case.scale
    return [partial(_call, attention, config, scale, *tensors) for tensors in _heads_first(inputs)]


def _call(attention: Callable[..., Any], config: ThriftConfig, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, config=config, scale=scale, backend="triton")


def _stages(config: ThriftConfig, inputs: Inputs) -> list[Launch]:
    """Every stage alone, on what the stages before it wrote."""
    from thrift_attn.dispatch import check_prefill
    from thrift_attn.numerics import PrefillNumerics
    from thrift_attn.prefill import ops
    from thrift_attn.prefill.bundles import KernelNumerics, LogitRules, PrefillTensors
    from thrift_attn.prefill.select import plan_blocks
    from thrift_attn.seq_layout import dense

    case = inputs.case
    rules, numerics = LogitRules(case.scale), PrefillNumerics.resolve(config)
    steps: dict[str, list[Step]] = {}
    for q, k, v in _heads_first(inputs):
        tensors = PrefillTensors(q, k, v)
        options = KernelNumerics.of(numerics, check_prefill(config, case.head_dim, q.dtype, q.device, case.kv))
        layout = dense(case.batch, case.tq, case.kv, True, q.device)
        plan = plan_blocks(numerics, layout)
        packed = ops.quantise(tensors, layout, options)
        lists = ops.select(tensors, packed, layout, options, plan, None)
        sm90_fp8 = ops.on_sm90_fp8(tensors, layout, options, plan, rules, stats=False)
        stages: dict[str, Step] = {
            "quantise": partial(ops.quantise, tensors, layout, options),
            "select": partial(ops.select, tensors, packed, layout, options, plan, None),
            "attend": partial(ops.attend, tensors, packed, lists, layout, options, rules, sm90_fp8=sm90_fp8),
        }
        for name, stage in stages.items():
            steps.setdefault(name, []).append(stage)
    moved = stage_bytes(config, case)
    return [Launch(name, found, moved[name]) for name, found in steps.items()]


def stage_bytes(config: ThriftConfig, case: Case) -> dict[str, int]:
    """Bytes that each stage must move when packed data are stored in their format, promoted blocks left out.

    Decoded data, where there are no units for the format, take 16 bits an element and more than this.
    """
    queries = case.batch * case.q_heads * case.tq * case.head_dim
    elements = case.plain_elements + (queries if config.compute == "fp4" else 0)
    packed = int(elements * FORMATS[config.base_format].bits_per_element(case.head_dim) / 8)
    means = 4 * queries // BLOCK + case.plain_elements // BLOCK  # float32 of Q, 16-bit of K
    return {
        "quantise": 2 * (case.plain_elements + queries) + packed + means,
        "select": means,
        "attend": packed + 2 * queries + (0 if config.compute == "fp4" else 2 * queries),
    }


# --- the kernels that people use -------------------------------------------------------------------------------------


def _sdpa_variants(backend: str, case: Case) -> list[Variant]:
    from torch.nn.attention import SDPBackend

    return [Variant("[B, H, T, D]", partial(_sdpa, getattr(SDPBackend, backend)))]


def _sdpa(backend: Any, inputs: Inputs) -> list[Step]:
    from torch.nn.attention import sdpa_kernel

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return [partial(step, *tensors) for tensors in _heads_first(inputs)]


def _fa3_variants(fp8: bool, case: Case) -> list[Variant]:
    call = fa3_module().flash_attn_func
    if torch.cuda.get_device_capability()[0] != 9:
        raise Absent("FlashAttention-3 needs compute capability 9.0")
    return [Variant("[B, T, H, D]", partial(_fa3, call, fp8))]


def _fa3(call: Callable[..., Any], fp8: bool, inputs: Inputs) -> list[Step]:
    """8-bit copies have scale 1 (the inputs lie well inside the range) and are made outside the timing."""
    case = inputs.case

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = call(q, k, v, softmax_scale=case.scale, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    sets = zip((q.transpose(1, 2).contiguous() for q in inputs.q), inputs.k, inputs.v, strict=True)
    return [partial(step, *(x[:, : case.kv].to(FP8) if fp8 else x[:, : case.kv] for x in tensors)) for tensors in sets]


def _sage_variants(case: Case) -> list[Variant]:
    if case.head_dim not in (64, 96, 128):
        raise Absent(f"SageAttention serves head dims 64, 96 and 128, got {case.head_dim}")
    return [Variant("[B, H, T, D]", partial(_sage, import_module("sageattention").sageattn))]


def _sage(call: Callable[..., Any], inputs: Inputs) -> list[Step]:
    """Its own quantisation inside the call. It takes the mean off K in place, which changes nothing the second time."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, k, v, tensor_layout="HND", is_causal=True, sm_scale=inputs.case.scale)

    return [partial(step, q, k.clone(), v) for q, k, v in _heads_first(inputs)]


def _bytes(element: int) -> Callable[[Case], int]:
    """Q, K and V once and the 16-bit output."""

    def moved(case: Case) -> int:
        queries = case.batch * case.q_heads * case.tq * case.head_dim
        return (case.plain_elements + queries) * element + 2 * queries

    return moved


def _row(name: str, kind: Any, package: str, precision: str, computes: Rounding, variants: Any) -> Method:
    return Method(
        name, kind, package, precision, computes, _bytes(1 if kind == "fp8" else 2), lambda case: 0.0, variants
    )


_P16, _ALL8, _INT8 = Rounding(p=BF16), Rounding(kv=FP8, q=FP8, p=FP8), Rounding(kv=FP8, q=FP8, p=torch.float16)
_W16 = "16-bit Q, K, V"
_FA3, _FA3_FP8 = partial(_fa3_variants, False), partial(_fa3_variants, True)
_CUDNN, _FLASH = (partial(_sdpa_variants, name) for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"))

# fmt: off
BASELINES: tuple[Method, ...] = (
    #    name                         kind    package          precision                 computes  settings
    _row("cuDNN SDPA",                "bf16", "torch",         _W16,                     _P16,     _CUDNN),
    _row("FlashAttention-2 (torch)",  "bf16", "torch",         _W16,                     _P16,     _FLASH),
    _row("FlashAttention-3",          "bf16", "fa3_fwd",       _W16,                     _P16,     _FA3),
    _row("FlashAttention-3 FP8",      "fp8",  "fa3_fwd",       "8-bit Q, K, V, P",       _ALL8,    _FA3_FP8),
    _row("SageAttention",             "fp8",  "sageattention", "INT8 Q, K, 16-bit V, P", _INT8,    _sage_variants),
)
# fmt: on


def small_case(shape: PrefillCase) -> PrefillCase:
    """The small case of a shape: its heads and dtype, so that the same kernels run."""
    return replace(shape, batch=1, kv=min(shape.kv, SMALL_KV))
