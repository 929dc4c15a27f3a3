"""What the stages of prefill hand on to one another, under names: tensors, options and lists.

Letters in shapes: B sequences, P leading size of packed tensors, N blocks and R query rows of a part (`SeqLayout`), K room in
a list of promoted blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

from torch import Tensor

from thrift_attn.dispatch import Form
from thrift_attn.numerics import PrefillNumerics

BASE_FORMATS = ("nvfp4", "mxfp4", "fp8", "drop")
FORMS: tuple[Form, ...] = ("decoded", "native")
RESIDUALS = (None, "nested", "nested8")


class PrefillTensors(NamedTuple):
    """The operands of a call, 16-bit and contiguous in D.

    Args:
        q: ``[B, Hq, Tq, D]``, or ``[1, Hq, tokens, D]`` for sequences end to end.
        k: ``[B, Hkv, Tk, D]``, or ``[1, Hkv, tokens, D]``.
        v: the shape of ``k``.
    """

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, kw_only=True)
class KernelNumerics:
    """`PrefillNumerics` as far as kernels follow it; budget and score have become lists by then.

    Args:
        base_format: ``"nvfp4"``, ``"mxfp4"``, ``"fp8"``, or ``"drop"``: promoted blocks alone.
        form: how packed data are multiplied, see `thrift_attn.prefill.pack`.
        residual: residual plane of promoted blocks, or None for the 16-bit K and V.
        quantise_qp: see `PrefillNumerics`, as the following.
        centred: likewise.
        exact_sink: likewise.
        subtract_query_mean: likewise.
        channel_scales: likewise.
        v_head_scales: likewise.
        normalize_rounded: likewise.
        best_scales: likewise.
        force_first: likewise.
        force_last: likewise.
    """

    base_format: str
    form: Form
    residual: str | None
    quantise_qp: bool
    centred: bool
    exact_sink: bool
    subtract_query_mean: bool
    channel_scales: bool
    v_head_scales: bool
    normalize_rounded: bool
    best_scales: bool
    force_first: int
    force_last: int

    @classmethod
    def of(cls, numerics: PrefillNumerics, form: Form) -> KernelNumerics:
        """Return what kernels need of ``numerics`` when packed data are multiplied as ``form`` says."""
        names = [field.name for field in fields(cls) if field.name != "form"]
        return cls(form=form, **{name: getattr(numerics, name) for name in names})

    def pack(self) -> list[int]:
        """Return all entries as numbers, for an operator's schema."""
        base, form, residual, *others = astuple(self)
        return [BASE_FORMATS.index(base), FORMS.index(form), RESIDUALS.index(residual), *map(int, others)]

    @classmethod
    def unpack(cls, numbers: Sequence[int]) -> KernelNumerics:
        """Return the bundle whose `pack` gave ``numbers``."""
        base, form, residual, *others = numbers
        values = [BASE_FORMATS[base], FORMS[form], RESIDUALS[residual], *map(bool, others[:-2]), *others[-2:]]
        return cls(**{field.name: value for field, value in zip(fields(cls), values, strict=True)})


class LogitRules(NamedTuple):
    """How logits are made of products, beside the causal mask.

    Args:
        scale: their factor.
        window: sliding window in tokens, or None.
        softcap: their bound, or None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class BlockPlan(NamedTuple):
    """How many blocks every query row promotes.

    Args:
        wanted: int32 ``[B, max_q_blocks]``, or ``[1, ...]`` when all sequences have one length; one column where ``shared``.
        capacity: K, at least the largest of ``wanted``.
        shared: up to 16 new tokens: all queries of a KV head share one list.
    """

    wanted: Tensor
    capacity: int
    shared: bool


class BlockLists(NamedTuple):
    """The promoted blocks of every query row.

    Args:
        block_indices: ascending, int32 ``[P, Hq, R, K]``, undefined from the count on.
        block_counts: int32 ``[P, Hq, R]``; 0 for rows that no sequence has.
    """

    block_indices: Tensor
    block_counts: Tensor


class PrefillOutput(NamedTuple):
    """What attention writes.

    Args:
        out: the shape and dtype of ``q``, contiguous in D.
        lse: float32, its first three dimensions, natural logarithm, contiguous in the last.
        high_fraction: the shape of ``lse``: the share of each row's softmax mass that took the high path; empty if not wanted.
    """

    out: Tensor
    lse: Tensor
    high_fraction: Tensor
