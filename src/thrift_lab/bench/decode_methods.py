"""Our side of the benchmark, the only place that knows the cache and the kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from thrift_attn.config import ThriftConfig
from thrift_attn.reference.formats import FORMATS, RESIDUALS
from thrift_lab.bench.cases import DecodeCase, thrift_bytes
from thrift_lab.bench.inputs import Inputs
from thrift_lab.bench.timing import Step
from thrift_lab.bench.variants import Launch, Method, Variant

APPEND = 8192
"""Tokens appended at a time."""


def method(case: DecodeCase) -> Method:
    """The row of our method for the storage and budget of a case.

    The inputs that the runner hands out belong to the case's shape and know neither, so both are bound here.
    """
    return Method(
        name=f"thrift {case.promoted_storage} {case.budget}" + (" paper" if case.config_name == "paper" else ""),
        kind="thrift",
        package="thrift-attn",
        precision=f"16-bit Q, {case.config.base_format} K, V, {case.promoted_storage} for {case.budget} of the blocks",
        computes=case.config,
        bytes=lambda _: thrift_bytes(case)["step"],
        bytes_per_token=lambda _: _bytes_per_token(case),
        variants=lambda case: [Variant("paged", partial(_steps, case.config))],
        launches=partial(_launches, case),
    )


def _bytes_per_token(case: DecodeCase) -> float:
    """Cache bytes per token of one layer by the formats: base, high plane and block centres."""
    low = FORMATS[case.config.base_format].bits_per_element(case.head_dim)
    high = 16 if case.promoted_storage == "16bit" else RESIDUALS[case.promoted_storage].bits_per_element(case.head_dim)
    return case.kv_heads * case.head_dim * (2 * (low + high) + 16 / 64) / 8


def fill(config: ThriftConfig, inputs: Inputs, at: int) -> Any:
    """Return a cache that holds one input set.

    Args:
        config: what is stored and computed.
        inputs: of the shape.
        at: which set.
    """
    from thrift_attn.cache import PagedThriftCache

    case = inputs.case
    cache = PagedThriftCache(
        num_pages=case.batch * case.blocks,
        batch=case.batch,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_pages=case.blocks,
        config=config,
        dtype=case.torch_dtype,
        device=inputs.q[0].device,
    )
    for start in range(0, case.kv, APPEND):
        part = slice(start, min(start + APPEND, case.kv))
        cache.append(*(x[at][:, part].transpose(1, 2).contiguous() for x in (inputs.k, inputs.v)))
    return cache


def _steps(config: ThriftConfig, inputs: Inputs) -> list[Step]:
    """The whole step (scores, selection, attention, merge) on every input set."""

    def step(cache: Any, q: Tensor) -> Tensor:
        return cache.attend(q, scale=inputs.case.scale)

    return [partial(step, fill(config, inputs, at), q) for at, q in enumerate(inputs.q)]


def _launches(case: DecodeCase, inputs: Inputs) -> list[Launch]:
    """Every kernel of the step alone, on what the kernels before it wrote."""
    from thrift_attn.decode.ops import begin_step, step_kernels

    kernels: dict[str, list[Step]] = {}
    for at, q in enumerate(inputs.q):
        cache = fill(case.config, inputs, at)
        step = begin_step(q, cache.tensors(), cache.numerics, scale=inputs.case.scale)
        for name, launch in step_kernels(step).items():
            launch()
            kernels.setdefault(name, []).append(launch)
    bytes_moved = thrift_bytes(case)
    return [Launch(name, steps, bytes_moved[name]) for name, steps in kernels.items()]
