"""What the kernels of decode work on: the tensors of a cache, and one step over them with the buffers between its kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.kernels.launcher import MAX_GRID, check_rows
from thrift_attn.numerics import DecodeNumerics

MAX_BLOCKS = 65536
"""Most KV blocks of one sequence that promoted ones are chosen among."""

WIDE_BLOCKS = 2048
"""Entries of a page table (131,072 tokens) beyond which kernels look at the length first: most entries may lie behind it."""

MAX_HEADS = MAX_GRID
"""Most (sequence, KV head) pairs of one launch: they lie along the second or third axis of a grid."""


def check_sizes(sequences: int, kv_heads: int, max_blocks: int) -> None:
    """Check that the kernels can serve a cache of these sizes, before it holds anything.

    Raises:
        ValueError: more sequences times KV heads than one launch serves, or more blocks than one sequence may have.
    """
    if sequences * kv_heads > MAX_HEADS:
        raise ValueError(
            f"the kernels serve at most {MAX_HEADS} sequences times KV heads, got {sequences} * {kv_heads} = "
            f"{sequences * kv_heads}"
        )
    if max_blocks > MAX_BLOCKS:
        raise ValueError(
            f"the kernels choose among at most {MAX_BLOCKS} blocks of a sequence ({MAX_BLOCKS * BLOCK} tokens), "
            f"got {max_blocks}"
        )


@dataclass(frozen=True, kw_only=True)
class ResidentTensors:
    """Which blocks keep the plane of promoted ones, and what decides it (`thrift_attn.reference.residents`).

    A sequence owns slots of that plane; in each of them every KV head holds a block of its own choice. A block is a resident
    where both directions agree: its page names a slot, and the slot names the block.

    Args:
        slot_of_page: int32 ``[pages, Hkv]``, contiguous like all of these: the slot of the block in a page, below 0 where there
            is none.
        block_of_slot: int32 ``[slots, Hkv]``, the number of the block in a slot in its sequence, below 0 where there is none.
        past_mass: float32 ``[pages, Hkv]``, the attention that the block in a page has had.
        slots: int32 ``[B, W]``: the slots of each sequence, shared ones first.
        bounds: int32 ``[B, 3]``, of each sequence: its shared slots, all its slots, its shared blocks.
        quota: int32 ``[NB + 1]``, residents of a sequence by its complete blocks.
    """

    slot_of_page: Tensor
    block_of_slot: Tensor
    past_mass: Tensor
    slots: Tensor
    bounds: Tensor
    quota: Tensor


@dataclass(frozen=True, kw_only=True)
class CacheTensors:
    """All that a paged cache of one layer holds on its device.

    Args:
        base: the base plane of all pages, int32 ``[pages, Hkv, plane_size(D, 4).words]``. Pages and heads of this and the next
            two may lie anywhere (each head of a page one record of all three, say), at multiples of 16 bytes.
        k_block_mean: c_b ``[pages, Hkv, D]``, 16-bit.
        high: the plane of promoted blocks: int32 residual words ``[slots, Hkv, words]``, or for the 16-bit copy
            ``[slots, Hkv, 128 * D]`` in the dtype of ``k_block_mean``; None where nothing is promoted. Without ``residents``
            slots are pages.
        tail: ``[rings, 2, Hkv, R, D]``, contiguous in D: K and V of the newest tokens of a sequence, token t at t mod R. R is
            at least 64, and as much more as tokens may be taken back or, less one, come in one step.
        rings: int32 ``[B]``, contiguous: the ring of each sequence.
        block0_mean: ``[B, Hkv, D]``: mean of K of the first block without its first token; with ``first_in_page``
            ``[pages, Hkv, D]``, in the row of that block's page. Contiguous in D.
        sink_value: V of the first token, with the shape and strides of ``block0_mean``.
        page_table: int32 ``[B, NB]``, contiguous: the page of each block, below 0 where there is none.
        lengths: int32 ``[B]``, contiguous: tokens of each sequence. What is more than the page table and an incomplete block
            hold is not read.
        budget: int32 ``[NB + 1]``, contiguous: how many blocks to promote where so many complete ones are seen
            (`thrift_attn.reference.budget.promoted_in_decode`).
        overrun: int32 ``[1]``, 1 after a step for which a sequence had no page, or that brought it more tokens than was said;
            what that step brought is lost.
        k_channel_scale: float32 ``[B, Hkv, D]``, contiguous, powers of two that K is multiplied by when it is packed to 4 bits,
            and Q divided by; written with the first block of a sequence. ``[Hkv, D]`` for one set of all sequences, which is
            never written. None for neither K nor V.
        v_head_scale: float32 ``[B, Hkv]`` or ``[Hkv]``, contiguous, likewise for V and what is summed of it.
        first_in_page: whether pages hold what else belongs to the first token, so that sequences that share them share it.
        promotes_all: whether ``budget`` promotes all blocks at every length that the page table has room for.
    """

    base: Tensor
    k_block_mean: Tensor
    high: Tensor | None
    tail: Tensor
    rings: Tensor
    block0_mean: Tensor
    sink_value: Tensor
    page_table: Tensor
    lengths: Tensor
    budget: Tensor
    overrun: Tensor
    k_channel_scale: Tensor | None = None
    v_head_scale: Tensor | None = None
    residents: ResidentTensors | None = None
    first_in_page: bool = False
    promotes_all: bool = False

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.base.shape[1]

    def strides(self, *planes: str) -> dict[str, int]:
        """Strides of pages and heads by the names of the kernels' constants, in elements.

        Args:
            planes: ``"base"``, ``"high"``, ``"mean"`` or ``"first"`` (``block0_mean`` and ``sink_value``).
        """
        high = self.base if self.high is None else self.high
        tensors = {"base": self.base, "high": high, "mean": self.k_block_mean, "first": self.block0_mean}
        found = {}
        for plane in planes:
            page, head, _ = tensors[plane].stride()
            found |= {f"{plane.upper()}_PAGE": page, f"{plane.upper()}_HEAD": head}
        return found

    @property
    def ring_constants(self) -> dict[str, int]:
        """R and the strides of the tail by the names of the kernels' constants."""
        ring, kv, head, token, _ = self.tail.stride()
        size = self.tail.shape[3]
        return {"RING": size, "TAIL_RING": ring, "TAIL_KV": kv, "TAIL_HEAD": head, "TAIL_TOKEN": token}

    @property
    def scales_fixed(self) -> bool:
        """Whether all sequences have one set of scales, which is not taken from their first blocks."""
        return self.k_channel_scale is not None and self.k_channel_scale.ndim == 2

    def _tables(self, batch: int) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        """Tables of integers by name, which kernels take for contiguous, and the shape each must begin with."""
        found = {
            "page_table": (self.page_table, (batch,)),
            "lengths": (self.lengths, (batch,)),
            "rings": (self.rings, (batch,)),
            "budget": (self.budget, ()),
        }
        if (residents := self.residents) is not None:
            heads = (self.kv_heads,)
            found |= {
                "slot_of_page": (residents.slot_of_page, (len(residents.past_mass), *heads)),
                "block_of_slot": (residents.block_of_slot, (len(residents.block_of_slot), *heads)),
                "slots": (residents.slots, (batch,)),
                "bounds": (residents.bounds, (batch, 3)),
                "quota": (residents.quota, (self.max_blocks + 1,)),
            }
        return found

    def check_beside(self, batch: int, dim: int) -> None:
        """Raise ValueError, or TypeError for the type of a table, unless what does not lie in planes fits so many sequences of
        this head dim."""
        for name, (table, want) in self._tables(batch).items():
            if table.dtype != torch.int32:
                raise TypeError(f"expected {name} of int32, got {table.dtype}")
            if table.shape[: len(want)] != want or not table.is_contiguous():
                shape = ", ".join(map(str, want)) + ", ..." * (table.ndim > len(want))
                raise ValueError(
                    f"expected contiguous {name} [{shape}], got {list(table.shape)} with strides {table.stride()}"
                )
        if self.residents is not None and not self.residents.past_mass.is_contiguous():
            raise ValueError(f"past_mass must be contiguous, got strides {self.residents.past_mass.stride()}")
        rows, heads = len(self.base) if self.first_in_page else batch, self.kv_heads
        first, value = self.block0_mean, self.sink_value
        if first.shape[1:] != (heads, dim) or len(first) < rows or value.stride() != first.stride():
            raise ValueError(
                f"expected block0_mean and sink_value [{rows}, {heads}, {dim}] of the same strides, got {list(first.shape)} "
                f"and {list(value.shape)} with strides {first.stride()} and {value.stride()}"
            )
        check_rows(block0_mean=first, sink_value=value)
        k_scale, v_scale = self.k_channel_scale, self.v_head_scale
        if k_scale is not None and v_scale is not None:
            want = (heads, dim) if self.scales_fixed else (batch, heads, dim)
            dense = k_scale.is_contiguous() and v_scale.is_contiguous()
            if k_scale.shape != want or v_scale.shape != want[:-1] or not dense:
                raise ValueError(
                    f"expected contiguous scales [{batch}, {heads}, {dim}] and [{batch}, {heads}], or [{heads}, {dim}] and "
                    f"[{heads}] for all sequences, got {list(k_scale.shape)} with strides {k_scale.stride()} and "
                    f"{list(v_scale.shape)} with {v_scale.stride()}"
                )
        self._check_tail(batch, dim)

    def _check_tail(self, batch: int, dim: int) -> None:
        """Raise ValueError unless the tail has rings for so many sequences of this head dim."""
        want, tail = (2, self.kv_heads, dim), self.tail
        if tail.ndim != 5 or (*tail.shape[1:3], tail.shape[4]) != want or tail.shape[3] < BLOCK:
            shape = f"[rings, 2, {self.kv_heads}, R, {dim}]"
            raise ValueError(f"expected a tail {shape} with R of at least {BLOCK}, got {list(tail.shape)}")
        check_rows(tail=tail)

    @property
    def max_blocks(self) -> int:
        """NB, entries of the page table for one sequence."""
        return self.page_table.shape[1]


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of sequences, heads and tokens of rows ``[B, H, T, D]``, or packed ones ``[tokens, H, D]``."""
    return x.stride()[:3] if x.ndim == 4 else (0, x.stride(1), x.stride(0))  # pyright: ignore[reportReturnType]


def check_starts(x: Tensor, starts: Tensor | None, batch: int) -> None:
    """Raise ValueError unless rows are packed where they have starts, for so many sequences, and only there."""
    if x.ndim != (4 if starts is None else 3):
        want = "[B, H, T, D]" if starts is None else "[tokens, H, D], as there are starts"
        raise ValueError(f"expected {want}, got {list(x.shape)}")
    if starts is not None and (starts.shape != (batch + 1,) or not starts.is_contiguous()):
        raise ValueError(f"expected contiguous starts [{batch + 1}], got {list(starts.shape)}")


def padded_queries(tq: int) -> int:
    """New tokens as the kernels are compiled for them: 1, 2, 4, 8 or 16."""
    return 1 << (tq - 1).bit_length()


def padded_rows(group: int, tq: int) -> int:
    """Query rows of one KV head as the kernels store them: those of `padded_queries`, up to 8 or a multiple of 16."""
    rows = group * padded_queries(tq)
    return 8 if rows <= 8 else -(-rows // 16) * 16


def served_one_each(cache: CacheTensors, numerics: DecodeNumerics) -> bool:
    """Whether `DecodeStep.one_each` can be: every block has a residual, which adds to its base, and fits a warp's registers."""
    dim = cache.tail.shape[-1]
    return numerics.promoted_storage in ("nested", "nested8") and cache.residents is None and dim <= 128


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """One step of decode: queries, cache, options, and what each kernel leaves for those after it.

    Args:
        q: queries ``[B, Hq, Tq, D]``, 16-bit, contiguous in D; query i of a sequence sits at position length - Tq + i. With
            ``starts`` packed, ``[tokens, Hq, D]``.
        tq: Tq; with ``starts`` the most queries of a sequence. For one that has more nothing is read: its rows are 0 and -inf,
            or are not written.
        starts: int32 ``[B + 1]``, contiguous: the first query of each sequence and the end of the last. A sequence may have no
            query: then nothing is read or written for it. None: queries are not packed.
        cache: the tensors of the cache.
        numerics: what is stored and computed.
        scale: factor of the logits.
        window: tokens that a query sees, itself included; None for all.
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
        overlap: each kernel starts while the one before it ends (programmatic dependent launch).
        one_each: every block of the page table has a split of its own, which finds out by itself whether its block is promoted
            (`thrift_attn.decode.attend_each_kernel`); then no list is written.
        bias: float32 ``[B, Hkv, NB, RP]``: logits q.c_b of complete blocks times log2(e), rows (query, group head).
        scores: float32 ``[B, Hkv, NB]``: the largest of them, of complete blocks.
        first_scores: float32 ``[B, Hkv, NB]``: the largest of those of the first query, which is never a draft; with one query
            those are ``scores``. Only where the cache has residents.
        score_lse: float32 ``[B, Hkv, NB / 64]``: log2 of the sum of 2^first_scores over 64 blocks each; likewise.
        block_indices: int32 ``[B, Hkv, 2, NB]``: numbers of the complete blocks that are seen, the promoted ones before the
            others and each part in order, and their pages; with residents ``[B, Hkv, 3, NB]``, their slots as well.
        block_counts: int32 ``[B, Hkv, 2]``: how many are promoted, and how many are listed.
        partial_out: float32 ``[B, Hkv, splits, RP, D]``.
        partial_lse: float32 ``[B, Hkv, splits, RP]``, base 2, -inf for an empty split.
        out: shape of ``q``, contiguous in D; zeros for a row that sees no token. Rows of no sequence are not written.
        lse: float32 ``[B, Hq, Tq]``, or ``[tokens, Hq]`` where queries are packed, contiguous, natural logarithm; -inf for a
            row that sees no token.

    Raises:
        ValueError: shapes or strides that do not fit.
        TypeError: queries that are not 16-bit, or of another dtype than the cache.
    """

    q: Tensor
    tq: int
    starts: Tensor | None
    cache: CacheTensors
    numerics: DecodeNumerics
    scale: float
    window: int | None
    softcap: float | None
    overlap: bool
    one_each: bool
    bias: Tensor
    scores: Tensor
    first_scores: Tensor
    score_lse: Tensor
    block_indices: Tensor
    block_counts: Tensor
    partial_out: Tensor
    partial_lse: Tensor
    out: Tensor
    lse: Tensor

    def __post_init__(self) -> None:
        check_starts(self.q, self.starts, len(self.cache.lengths))
        batch, heads, dim = self.batch, self.heads, self.dim
        kv_heads, tail = self.cache.kv_heads, self.cache.tail
        if heads % kv_heads:
            raise ValueError(f"{kv_heads} KV heads must divide the heads of q, got q {list(self.q.shape)}")
        if self.q.dtype not in (torch.float16, torch.bfloat16) or tail.dtype != self.q.dtype:
            raise TypeError(f"expected 16-bit q and tail of one dtype, got {self.q.dtype} and {tail.dtype}")
        self.cache.check_beside(batch, dim)
        check_rows(q=self.q, out=self.out)
        if self.out.shape != self.q.shape or self.out.dtype != self.q.dtype:
            raise ValueError(f"expected out {list(self.q.shape)} like q, got {list(self.out.shape)} {self.out.dtype}")
        rows = padded_rows(heads // kv_heads, self.tq)
        if self.bias.shape[-1] != rows or self.partial_out.shape[3:] != (rows, dim):
            raise ValueError(
                f"expected bias [B, {kv_heads}, NB, {rows}] and partial_out [B, {kv_heads}, splits, {rows}, {dim}] for q "
                f"{list(self.q.shape)}, got {list(self.bias.shape)} and {list(self.partial_out.shape)}"
            )
        splits, blocks = self.partial_out.shape[2], self.cache.max_blocks
        if self.one_each and (splits != blocks or not served_one_each(self.cache, self.numerics)):
            raise ValueError(
                f"a split for each of {blocks} blocks needs as many splits, a residual of every block and at most 128 "
                f"dimensions, got {splits} splits, {self.numerics.promoted_storage} and {self.dim} dimensions"
            )

    @property
    def scored(self) -> bool:
        """Whether the kernels work out scores: not where nothing is chosen."""
        return not (self.one_each and self.cache.promotes_all)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.q) if self.starts is None else len(self.starts) - 1

    @property
    def heads(self) -> int:
        """Hq, the second dimension of both forms of queries."""
        return self.q.shape[1]

    @property
    def dim(self) -> int:
        """D."""
        return self.q.shape[-1]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.cache.kv_heads

    @property
    def q_rows(self) -> int:
        """RP, padded query rows of a KV head."""
        return self.bias.shape[-1]

    @property
    def block0_mean(self) -> Tensor | None:
        """What block 0 is scored by in place of c_0, where the first token is exact."""
        return self.cache.block0_mean if self.numerics.exact_sink else None
