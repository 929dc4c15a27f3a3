"""The correctness check: float64 attention over the original K and V, and how much error each precision may show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from thrift_attn.config import ThriftConfig
from thrift_lab.bench.inputs import Inputs

CHUNK = 65536
"""Tokens converted to float64 at a time."""

SLACK_OURS = 1.2
"""Allowed error of our kernels over that of the reference in the same precision."""

SLACK_THEIRS = 3.0
"""Allowed error of a baseline over that of attention in float64 with its operands rounded: their inner order and
intermediate formats differ, and the check is there to catch a wrong call, not to rank them."""

P_TOP = 256.0
"""Probabilities are scaled by this before they are rounded to 8 bits, as 8-bit kernels do."""


@dataclass(frozen=True)
class Rounding:
    """Which operands a kernel holds in which dtype; None for no rounding beyond the input's."""

    kv: torch.dtype | None = None
    q: torch.dtype | None = None
    p: torch.dtype | None = None


@dataclass(frozen=True)
class Check:
    """One comparison with float64.

    Args:
        where: what was compared.
        error: ||out - float64|| / ||float64||; None when the output was not finite everywhere.
        budget: the largest error that passes.
    """

    where: str
    error: float | None
    budget: float

    @property
    def ok(self) -> bool:
        """Whether the output may be timed."""
        return self.error is not None and self.error <= self.budget

    def __str__(self) -> str:
        shown = "not finite" if self.error is None else f"{self.error:.2e}"
        return f"{self.where}: error {shown}, budget {self.budget:.2e}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def attention64(q: Tensor, k: Tensor, v: Tensor, *, scale: float, rounding: Rounding = Rounding()) -> Tensor:
    """Attention of one KV head in float64.

    Args:
        q: ``[G, Tq, D]``; query i sits at position T - Tq + i.
        k: ``[T, D]``.
        v: ``[T, D]``.
        scale: factor of the logits.
        rounding: operands that are rounded before use, to see what a precision costs.

    Returns:
        float64 ``[G, Tq, D]``.
    """

    def wide(x: Tensor, dtype: torch.dtype | None) -> Tensor:
        return (x if dtype is None else x.to(dtype)).double()

    tokens, rows = len(k), q.shape[1]
    query = wide(q, rounding.q) * scale
    logits = torch.cat([query @ wide(part, rounding.kv).T for part in k.split(CHUNK)], -1)  # [G, Tq, T]
    if rows > 1:
        last = torch.arange(tokens - rows, tokens, device=q.device)[:, None]
        logits.masked_fill_(torch.arange(tokens, device=q.device) > last, -torch.inf)
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    total = p.sum(-1, keepdim=True)
    if rounding.p is not None:
        top = P_TOP if rounding.p.itemsize == 1 else 1.0
        p = (p * top).to(rounding.p).double() / top
    out = torch.zeros_like(query)
    for at, part in enumerate(v.split(CHUNK)):
        out += p[..., at * CHUNK : at * CHUNK + len(part)] @ wide(part, rounding.kv)
    return out / total


def pick_samples(batch: int, kv_heads: int, most: int) -> list[tuple[int, int]]:
    """(sequence, KV head) pairs, all or ``most`` of them spread evenly, first and last included."""
    total = batch * kv_heads
    count = min(total, most)
    picked = {round(at * (total - 1) / max(1, count - 1)) for at in range(count)}
    return [divmod(at, kv_heads) for at in sorted(picked)]


@dataclass
class Reference:
    """Float64 results for samples of one input set, and the error budgets that follow from them.

    Args:
        inputs: the inputs; the first set is used.
        where: words for the record.
        samples: (sequence, KV head) pairs.
    """

    inputs: Inputs = field(repr=False)
    where: str
    samples: Sequence[tuple[int, ...]]
    _exact: list[Tensor] = field(init=False, repr=False)
    _budgets: dict[Rounding | ThriftConfig, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        case = self.inputs.case
        self._exact = [attention64(*self._operands(at), scale=case.scale) for at in self.samples]

    def _operands(self, sample: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """q [G, Tq, D], k [T, D], v [T, D] of a sample."""
        b, h = sample
        case, inputs = self.inputs.case, self.inputs
        group = slice(h * case.group, (h + 1) * case.group)
        return inputs.q[0][b, group], inputs.k[0][b, : case.kv, h], inputs.v[0][b, : case.kv, h]

    def _error(self, found: Sequence[Tensor]) -> float | None:
        """Relative error over all samples, None where something is not finite."""
        if not all(bool(out.isfinite().all()) for out in found):
            return None
        wrong = sum(float((out.double() - exact).square().sum()) for out, exact in zip(found, self._exact, strict=True))
        return (wrong / sum(float(exact.square().sum()) for exact in self._exact)) ** 0.5

    def budget(self, precision: Rounding | ThriftConfig) -> float:
        """Largest error that passes, for a baseline's rounding or for our configuration."""
        if precision not in self._budgets:
            if isinstance(precision, ThriftConfig):
                slack, found = SLACK_OURS, [self._reference(at, precision) for at in self.samples]
            else:
                scale, dtype = self.inputs.case.scale, self.inputs.case.torch_dtype
                slack = SLACK_THEIRS
                found = [
                    attention64(*self._operands(at), scale=scale, rounding=precision).to(dtype) for at in self.samples
                ]
            error = self._error(found)
            if error is None:
                raise ValueError(f"the reference for {precision} is not finite")
            self._budgets[precision] = slack * error
        return self._budgets[precision]

    def _reference(self, sample: tuple[int, ...], config: ThriftConfig) -> Tensor:
        """Our reference on one sample: selection is per KV head, so a sample stands alone."""
        from thrift_attn.interface import attention

        q, k, v = self._operands(sample)
        out = attention(q[None], k[None, None], v[None, None], config=config, backend="reference")
        return out[0]

    def _found(self, out: Tensor, sample: tuple[int, ...]) -> Tensor:
        """What an output holds for a sample."""
        b, h = sample
        group = self.inputs.case.group
        return out[b, h * group : (h + 1) * group]

    def check(self, out: Tensor, precision: Rounding | ThriftConfig) -> Check:
        """Compare an output with float64.

        Args:
            out: ``[B, Hq, Tq, D]`` of the first input set.
            precision: what the kernel computes in.

        Raises:
            ValueError: another shape or dtype.
        """
        case = self.inputs.case
        expected = [case.batch, case.q_heads, case.tq, case.head_dim]
        if list(out.shape) != expected or out.dtype != case.torch_dtype:
            raise ValueError(
                f"expected an output {expected} of {case.torch_dtype}, got {list(out.shape)} of {out.dtype}"
            )
        budget = self.budget(precision)
        if not bool(out.isfinite().all()):  # of all heads, also those that are not sampled
            return Check(self.where, None, budget)
        error = self._error([self._found(out, at) for at in self.samples])
        return Check(self.where, error, budget)
