"""Up to which length exact 16-bit attention is what runs: the rule, and what has been measured.

Exact attention of a short prompt is faster than quantising it. A sequence's own length decides, and facts that do not change
from call to call (GPU, format, head dim, what is installed), never the batch: so a row does not depend on its neighbours.
`thrift bench crossover` measures where the lines cross.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

Server = Literal["FlashAttention-3", "SDPA"]
"""Who computes exact attention, see `thrift_attn.exact`."""

EVERYWHERE = 2**31 - 1
"""``exact_below`` of what is exact at every length."""


QUERIES = 12
"""A chunk pays for quantising its keys from 1 / 12 of ``exact_below`` queries on.

Measured at 65,536 keys on an H100 against FlashAttention-3: 1 / 13 for D 128; from 1 / 70 on for D 64, where the rule leaves up
to a fifth of the time of such chunks unused.
"""


@overload
def is_exact(exact_below: int, keys: int, queries: int | None = ...) -> bool: ...


@overload
def is_exact(exact_below: int, keys: Tensor, queries: Tensor | None = ...) -> Tensor: ...


def is_exact(exact_below: int, keys: Any, queries: Any = None) -> Any:
    """Whether sequences are attended exactly: the one rule, for dispatch, kernels and reference.

    Quantising takes time for every key and is paid back by every query, so it needs enough of both: fewer keys than
    ``exact_below``, or fewer than a twelfth as many queries (`QUERIES`), are attended exactly.

    Args:
        exact_below: see `ThriftConfig`; 0 for never.
        keys: of a sequence, or integers ``[B]``.
        queries: likewise; None: not looked at (sequences packed end to end).
    """
    few = keys < exact_below
    return few if queries is None else few | (QUERIES * queries < exact_below)


class Crossover(NamedTuple):
    """What has been measured on one kind of GPU.

    Args:
        capability: of the GPU.
        base_format: what thrift computes there.
        head_dim: D.
        server: what computes exact attention.
        keys: a causal prompt of fewer tokens is faster exactly; with the default budget.
        source: of the number.
    """

    capability: tuple[int, int]
    base_format: str
    head_dim: int
    server: Server
    keys: int
    source: str


_H100 = "benchmarks/results/crossover/nvidia-h100-80gb-hbm3.json"

CROSSOVERS = (
    Crossover((9, 0), "fp8", 128, "FlashAttention-3", 21504, _H100),
    Crossover((9, 0), "fp8", 64, "FlashAttention-3", 22528, _H100),
    Crossover((9, 0), "fp8", 128, "SDPA", 13312, _H100),
    Crossover((9, 0), "fp8", 64, "SDPA", 14336, _H100),
)
"""GPUs, formats and head dims without a row have not been measured: nothing is exact there because it is faster."""


def measured(capability: tuple[int, int], base_format: str, head_dim: int, server: Server) -> int:
    """``exact_below`` of a kind of call; 0 if it has not been measured."""
    wanted = (capability, base_format, head_dim, server)
    return next((row.keys for row in CROSSOVERS if row[:4] == wanted), 0)
