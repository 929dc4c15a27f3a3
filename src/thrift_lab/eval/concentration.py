"""Where the error of 4-bit attention sits: by block, ordered by attention mass, per layer and head.

For a query i and a KV block b, with p and v exact and p^ and v^ from the low path (each p normalised over its row),

    e_ib = sum over the tokens j of b of (p^_ij v^_j - p_ij v_j),

so that the e_ib of a row add up to the error of its output. The error of a (query block, KV block) pair is the sum of
|e_ib|^2 over its queries, its mass the mean of sum_j p_ij. Pairs of a head are ordered by mass, and the share of the error in
the first x per cent is what could be removed by promoting them. Squares of different blocks do not add up to the square of
their sum, so a share says how errors are spread, not by how much the output error falls.

Source: the key observation of arXiv 2605.23081, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thrift_attn.config import BLOCK, ThriftConfig, fraction
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.reference import quantize as quant
from thrift_attn.reference.attention import build_planes
from thrift_attn.reference.formats import FORMATS
from thrift_lab.eval.watch import watched

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the blocks at which the share of the error is read off."""

FP4 = ThriftConfig.paper(budget=fraction(0))

_ROWS = {"cpu": 256, "cuda": 2048}  # queries at a time


@dataclass(frozen=True)
class Concentration:
    """One head of one layer.

    Args:
        layer: its number.
        head: query head.
        pairs: visible (query block, KV block) pairs.
        error: squared error of the output over its squared norm.
        shares: of the blocks' error in the first `SHARES` of the pairs by mass.
        mass: of the softmax in them.
    """

    layer: int
    head: int
    pairs: int
    error: float
    shares: tuple[float, ...]
    mass: tuple[float, ...]


def measure(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, layer: int = 0, config: ThriftConfig = FP4
) -> list[Concentration]:
    """Causal attention of one sequence, head by head.

    Args:
        q: ``[H, T, D]``.
        k: ``[Hkv, T, D]``.
        v: ``[Hkv, T, D]``.
        scale: factor of the logits.
        layer: number of the layer, for the result.
        config: of the low path: a 4-bit format with ``math="fp4"``, K centred by block or not at all, ``sink="none"``,
            ``balance="none"`` and ``total="exact"``; what it promotes is of no concern.

    Raises:
        ValueError: another configuration.
    """
    numerics = PrefillNumerics.resolve(config)
    plain = config.center in ("none", "block") and (config.sink_token, config.smooth, config.normalize) == (
        "none",
        "none",
        "exact",
    )
    if config.base_format not in ("nvfp4", "mxfp4") or config.compute != "fp4" or not plain:
        raise ValueError(
            "error concentration is that of 4-bit formats with compute='fp4', center 'none' or 'block', sink_token='none', "
            "smooth='none' and normalize='exact', got "
            f"{config.base_format}, {config.compute}, {config.center}, {config.sink_token}, {config.smooth}, {config.normalize}"
        )
    planes = build_planes(k, v, numerics)
    assert planes.low_k is not None
    assert planes.low_v is not None
    q = q.to(planes.high_k.dtype)
    rounded = quant.roundtrip(q, FORMATS[config.base_format], best=numerics.best_scales)
    found = []
    for head in range(len(q)):
        own = head * len(k) // len(q)
        centres = planes.k_block_mean[own] if numerics.centred else None
        low = (rounded[head], planes.low_k[own], planes.low_v[own])
        exact = (q[head], planes.high_k[own], planes.high_v[own])
        error, mass, total, norm = _pairs(low, exact, centres, scale, config, k.shape[1])
        seen = mass > 0
        order = mass[seen].argsort(descending=True)
        errors, masses = (x[seen][order].double().cumsum(0) for x in (error, mass))
        at = [max(1, round(share * len(order))) - 1 for share in SHARES]
        found.append(
            Concentration(
                layer=layer,
                head=head,
                pairs=len(order),
                error=float(total / norm),
                shares=tuple((errors[at] / errors[-1].clamp(min=1e-300)).tolist()),
                mass=tuple((masses[at] / masses[-1]).tolist()),
            )
        )
    return found


def _pairs(
    low: tuple[Tensor, Tensor, Tensor],
    exact: tuple[Tensor, Tensor, Tensor],
    centres: Tensor | None,
    scale: float,
    config: ThriftConfig,
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Error and mass of every pair ``[R, N]`` of one head, and its total squared output error and norm."""
    (q_low, k_low, v_low), (q, k, v) = low, exact
    blocks = len(k) // BLOCK
    error, mass = q.new_zeros(blocks, blocks), q.new_zeros(blocks, blocks)
    total, norm = q.new_zeros(()), q.new_zeros(())
    column = torch.arange(len(k), device=q.device)
    rows = _ROWS.get(q.device.type, _ROWS["cpu"])
    for start in range(0, tokens, rows):
        row = torch.arange(start, min(start + rows, tokens), device=q.device)
        seen = -(-(int(row[-1]) + 1) // BLOCK)  # blocks that any of the rows sees
        keys = slice(0, seen * BLOCK)
        hidden = column[keys] > row[:, None]
        bias = 0.0 if centres is None else (q[row] @ centres[:seen].mT).repeat_interleave(BLOCK, -1)
        p_low = _softmax(((q_low[row] @ k_low[keys].mT) + bias) * scale, hidden, config)
        p = _softmax((q[row] @ k[keys].mT) * scale, hidden, None)
        out_low, out = (
            torch.einsum("tns,nsd->tnd", x.unflatten(-1, (seen, BLOCK)), y[keys].unflatten(0, (seen, BLOCK)))
            for x, y in ((p_low, v_low), (p, v))
        )
        gap = out_low - out  # [T, N, D]
        block = row // BLOCK
        error[:, :seen].index_add_(0, block, gap.square().sum(-1))
        mass[:, :seen].index_add_(0, block, p.unflatten(-1, (seen, BLOCK)).sum(-1))
        total += gap.sum(1).square().sum()
        norm += out.sum(1).square().sum()
    return error, mass, total, norm


def _softmax(logits: Tensor, hidden: Tensor, config: ThriftConfig | None) -> Tensor:
    """Normalised probabilities, rounded in two levels before the division where there is a config."""
    logits = logits.masked_fill(hidden, -torch.inf)
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    total = p.sum(-1, keepdim=True)
    if config is not None:
        factor = FORMATS[config.base_format].p_factor or 1.0
        p = quant.roundtrip(p * factor, FORMATS[config.base_format]) / factor
    return p / total


def of_model(model: Any, tokens: Tensor, config: ThriftConfig = FP4) -> list[Concentration]:
    """Every layer and head of a model on one window, each layer fed with exact activations.

    Args:
        model: a causal language model in eval mode.
        tokens: ids int64 ``[L]``.
        config: of the low path.
    """
    found: list[Concentration] = []

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> None:
        q, k, v = (x[0].float() for x in (query, key, value))
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        found.extend(measure(q, k, v, factor, layer=module.layer_idx, config=config))

    with torch.inference_mode(), watched(model, look):
        model.base_model(input_ids=tokens[None].to(model.device), use_cache=False)
    return found
