"""The blocks of a layer as a cache holds them, and what they lose without their residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.pages import Pool, SequenceTensors, read_blocks, write_blocks
from thrift_attn.reference.quantize import mean_of_others


class PackedBlocks(NamedTuple):
    """The complete blocks of one layer as pages decode to, float32 ``[2, Hkv, N, 64, D]``: K, c_b included, and V.

    Args:
        exact: as they came.
        low: the 4-bit plane.
        high: the 4-bit plane and the residual.
        scored: what blocks are scored by ``[Hkv, N, D]``.
    """

    exact: Tensor
    low: Tensor
    high: Tensor
    scored: Tensor


def pack(k: Tensor, v: Tensor, numerics: DecodeNumerics) -> PackedBlocks:
    """Pack K and V ``[Hkv, N * 64, D]`` of one sequence as a cache does, and read them back.

    Args:
        k: keys.
        v: values.
        numerics: how blocks are stored.
    """
    heads, tokens, dim = k.shape
    exact = torch.stack([k, v]).unflatten(2, (-1, BLOCK))
    blocks = exact.transpose(1, 2)  # [2, N, Hkv, 64, D]
    pages = torch.arange(tokens // BLOCK, device=k.device)
    pool = Pool.empty(len(pages), heads, dim, numerics.promoted_storage, k.dtype, k.device)
    empty = SequenceTensors.empty(1, heads, dim, scaled=numerics.channel_scales, dtype=k.dtype, device=k.device)
    sequence = empty.each(lambda x: x[0])
    for part, first in ((slice(0, 1), True), (slice(1, None), False)):
        own = {"numerics": numerics, "sequence": sequence, "first": first}
        write_blocks(pool, pages[part], blocks[0, part], blocks[1, part], **own)
    read = read_blocks(pool, pages, numerics=numerics, sequence=sequence)
    centre = read.k_block_mean[:, :, None] if numerics.centred else 0
    low, high = torch.stack([read.low_k + centre, read.low_v]), torch.stack([read.high_k, read.high_v])
    scored = read.k_block_mean.transpose(0, 1).clone()
    if numerics.exact_sink:  # its key is exact as the centre of its block, its value lies beside the pages
        low[1, 0, :, 0] = high[1, 0, :, 0] = sequence.sink_value.float()
        scored[:, 0] = mean_of_others(k)
    return PackedBlocks(exact, low.transpose(1, 2), high.transpose(1, 2), scored)


def block_error(of: str, packed: PackedBlocks, queries: Tensor, scale: float) -> Tensor | None:
    """What a block loses without its residual, one number ``[Hkv, N]`` that packing can work out; None for ``"none"``.

    Args:
        of: ``"k"`` or ``"v"``: the squared error of its K or V; ``"logits"``: the mean square of the error of a logit, by the
            queries of its own tokens, channels counting as if they were independent.
        packed: the blocks.
        queries: ``[Hkv, G, N, 64, D]``.
        scale: factor of the logits.
    """
    if of == "none":
        return None
    plane = "kv".index(of) if of != "logits" else 0
    squares = (packed.low[plane] - packed.exact[plane]).square().sum(2)  # [Hkv, N, D]
    if of == "logits":
        squares = squares * queries.square().mean((1, 3)) * (scale * scale / BLOCK)
    return squares.sum(-1)


class LostError:
    """The squared error of the outputs of heads that blocks without a residual leave, each block by itself.

    To first order: a block whose logits are off by e and whose values by d adds ``sum p (e (v - o) + d)`` to the output o.
    What the errors of two blocks have in common is left out.

    Args:
        packed: the blocks.
        group: query heads of a KV head, G.
        rules: how many rules are compared.
    """

    def __init__(self, packed: PackedBlocks, group: int, rules: int):
        heads = packed.low.shape[1]
        wrong = packed.low - packed.high
        self._keys = wrong[0].flatten(1, 2).mT.contiguous()  # [Hkv, D, T]
        self._values, self._high = wrong[1], packed.high[1]
        self._left = wrong.new_zeros(rules, heads, group)
        self._most, self._size = (wrong.new_zeros(heads, group) for _ in range(2))

    def add(
        self, rows: Tensor, weights: Tensor, out: Tensor, held: list[tuple[Tensor, str]], block: int, scale: float
    ) -> None:
        """Count one chunk.

        Args:
            rows: its queries ``[Hkv, G * 64, D]``.
            weights: its attention ``[Hkv, G * 64, T]``.
            out: its output ``[Hkv, G, 64, D]``.
            held: for each rule its residents, bool ``[Hkv, N]``, and what their residual refines.
            block: number of complete blocks before it.
            scale: factor of the logits.
        """
        group = out.shape[1]
        self._size += out.square().sum((2, 3))
        if not block:
            return
        stop = block * BLOCK

        def by_block(x: Tensor) -> Tensor:
            """``[Hkv, G * 64, n * 64]`` to ``[Hkv, n, G * 64, 64]``."""
            return x.unflatten(-1, (block, BLOCK)).transpose(1, 2)

        attention = weights[..., :stop]
        shifted = by_block(attention * (rows @ self._keys[:, :, :stop]).mul_(scale))
        of_k = shifted @ self._high[:, :block] - shifted.sum(-1, keepdim=True) * out.flatten(1, 2)[:, None]
        of_v = by_block(attention) @ self._values[:, :block]
        # Squares by query head: [Hkv, n, G].
        k, v, both = (x.square().sum(-1).unflatten(-1, (group, BLOCK)).sum(-1) for x in (of_k, of_v, of_k + of_v))
        self._most += both.sum(1)
        after = {"kv": torch.zeros_like(both), "k": v, "v": k}  # what a residual of this leaves
        for i, (resident, planes) in enumerate(held):
            self._left[i] += torch.where(resident[:, :block, None], after[planes], both).sum(1)

    def left(self, rule: int) -> float:
        """What a rule leaves, relative to the outputs, summed over heads."""
        return float((self._left[rule] / self._size).sum())

    def most(self) -> float:
        """What is left without any residual."""
        return float((self._most / self._size).sum())
