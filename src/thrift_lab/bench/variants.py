"""What a timed method is: ours and the baselines look the same to the runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from thrift_attn.config import ThriftConfig
from thrift_lab.bench.cases import Case
from thrift_lab.bench.check import Rounding
from thrift_lab.bench.inputs import Inputs
from thrift_lab.bench.timing import Step

Kind = Literal["thrift", "bf16", "fp8"]
"""Our side, a baseline over a 16-bit cache, a baseline over an 8-bit cache."""


class Absent(RuntimeError):
    """A method cannot run here; the message says why."""


class Variant(NamedTuple):
    """One setting of a method.

    Args:
        label: in words.
        build: makes the cache and returns one step per input set; a step returns ``[B, Hq, Tq, D]``. May raise Absent.
    """

    label: str
    build: Callable[[Inputs], list[Step]]


class Launch(NamedTuple):
    """One kernel of a step, to be timed alone.

    Args:
        name: of the kernel.
        steps: one launch per input set.
        bytes: what it must move.
    """

    name: str
    steps: list[Step]
    bytes: int


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Args:
        name: as in the record.
        kind: what it is compared as.
        package: whose code runs, with the distribution that its version is read from.
        precision: operands in words.
        computes: what sets its error budget.
        bytes: what a step must move.
        bytes_per_token: of the cache, all KV heads of one layer.
        variants: its settings for a case, may raise Absent; the fastest correct one is timed at length.
        launches: its kernels one by one, for the fastest variant's inputs; empty when only the whole step is timed.
    """

    name: str
    kind: Kind
    package: str
    precision: str
    computes: Rounding | ThriftConfig
    bytes: Callable[[Case], int]
    bytes_per_token: Callable[[Case], float]
    variants: Callable[[Case], list[Variant]]
    launches: Callable[[Inputs], list[Launch]] = lambda inputs: []
