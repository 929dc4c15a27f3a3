"""A paged KV cache that holds every block in 4 bits and again in high precision, and attends over it.

A page is one KV block of 64 tokens. The newest, incomplete block of a sequence stays in 16 bits and is always attended in high
precision; when its 64th token arrives the block is centred, packed and summarised. The 16-bit data of the block before it
stays as well (a ring of 128 tokens, token t at t mod 128), so that taking back up to 64 tokens is lossless. Where the
first token of a sequence is exact (``sink_token="exact"``), its key is the centre of its block, and its value lies beside the
pages, which hold 0.
With ``smooth`` the 4-bit planes hold K and V times powers of two, which a sequence takes from its first block when that is
packed (`thrift_attn.reference.channel_scales.scales_of_block`) and which nobody outside sees. All that is kept in 16 bits is K
and V as they came.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

from thrift_attn.cache.admission import admit_blocks, note_queries, note_step
from thrift_attn.cache.changes import Changes
from thrift_attn.cache.page_table import PageTable
from thrift_attn.cache.residual_slots import ResidualSlots
from thrift_attn.cache.sequences import CacheSequences
from thrift_attn.checks import check_no_gradients, check_strided, checked_logits, positive, whole_number, whole_numbers
from thrift_attn.config import BLOCK, DECODE_ROWS, ThriftConfig, check_config
from thrift_attn.decode.tensors import MAX_BLOCKS, CacheTensors, check_sizes
from thrift_attn.dispatch import cache_config, check_cache
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference import attention as reference
from thrift_attn.reference.budget import decode_budget
from thrift_attn.reference.pages import Pool, SequenceTensors, sequence_planes, write_blocks
from thrift_attn.reference.residents import quota_table, slots_of_pool

DEFAULT = ThriftConfig.for_cache()


class PagedThriftCache(CacheSequences):
    """KV cache of one attention layer for a batch of sequences.

    On a CUDA device append and attend are kernels without host synchronisation: `attend`, and `append` of up to 64 tokens
    after `reserve`, can be captured in a CUDA graph and replayed while the lengths grow (call `advance` after each replay).
    On a CPU the same pages are written and read in plain PyTorch.

    A change that is interrupted (Ctrl-C, no memory) between its first and its last write leaves a cache that refuses everything
    but being dropped. Threads may use one cache, or several over one pool: one waits for the other. Caches over one pool may
    also run in several CUDA streams: one that takes pages which another used waits for it (`thrift_attn.cache.stream_order`).

    Args:
        batch: number of sequences.
        kv_heads: KV heads.
        head_dim: head dimension D, a multiple of 16.
        num_pages: pages in the pool, shared by all sequences.
        max_pages: most pages of one sequence; all of the pool by default, up to 65,536.
        max_tokens: most tokens of one sequence, where that is less than its pages hold.
        config: what is stored and computed; ``compute`` must be ``"16bit"`` and ``score`` ``"mean"``.
        dtype: dtype of K, V and Q: float16 or bfloat16 (float32 on a CPU as well).
        device: where the cache lives.

    Raises:
        ValueError: sizes out of range.
        TypeError: an unsupported dtype.
        NotImplementedError: a config or head dimension the cache does not serve.

    Example:
        >>> cache = PagedThriftCache(batch=1, kv_heads=2, head_dim=64, num_pages=8, dtype=torch.float32, device="cpu")
        >>> k = torch.randn(1, 2, 100, 64)
        >>> cache.append(k, k)
        >>> cache.attend(torch.randn(1, 4, 1, 64)).shape
        torch.Size([1, 4, 1, 64])
    """

    def __init__(
        self,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        num_pages: int,
        max_pages: int | None = None,
        max_tokens: int | None = None,
        config: ThriftConfig = DEFAULT,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
    ):
        batch, kv_heads = positive("batch", batch), positive("kv_heads", kv_heads)
        head_dim, num_pages = whole_number("head_dim", head_dim), positive("num_pages", num_pages)
        max_pages = min(num_pages, MAX_BLOCKS) if max_pages is None else positive("max_pages", max_pages)
        max_tokens = None if max_tokens is None else positive("max_tokens", max_tokens)
        if max_pages > MAX_BLOCKS:
            raise ValueError(f"max_pages must be at most {MAX_BLOCKS} ({MAX_BLOCKS * BLOCK} tokens), got {max_pages}")
        check_config(config)
        config, device = cache_config(config), torch.device(device)
        self.backend = check_cache(config, head_dim, dtype, device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if self.backend == "triton":
            check_sizes(batch, kv_heads, max_pages)
        self.config, self.dtype, self.device = config, dtype, device
        self.numerics = DecodeNumerics.resolve(config)
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.table = PageTable(num_pages, batch, max_pages, device, max_tokens)
        self._lock = threading.RLock()  # of the pool: caches that `branch` makes share it
        self._changes = Changes("make a new cache (ThriftCache.reset() does)")
        self.residual_slots, slots = None, num_pages
        if config.residual_share < 1:
            quota = quota_table(config.residual_share, config.budget, max_pages)
            slots = slots_of_pool(quota, num_pages, batch)
            self.residual_slots = ResidualSlots(slots, num_pages, batch, kv_heads, quota, device)
        self.pool = Pool.empty(num_pages, kv_heads, head_dim, config.promoted_storage, dtype, device, slots)
        # K and V of the newest tokens of each sequence, token t at t mod 128.
        self.tail = torch.zeros(batch, 2, kv_heads, 2 * BLOCK, head_dim, dtype=dtype, device=device)
        self.rings = torch.arange(batch, dtype=torch.int32, device=device)
        self.per_sequence = SequenceTensors.empty(
            batch, kv_heads, head_dim, scaled=self.numerics.channel_scales, dtype=dtype, device=device
        )
        self._tail_blocks = [[-1, -1] for _ in range(batch)]  # by sequence: the block in each half of its ring
        budget = decode_budget(config.budget, max_pages)  # by the number of complete blocks
        self.budget, self._promotes_all = budget.to(device), torch.equal(budget, torch.arange(max_pages + 1).int())
        self.overrun = torch.zeros(
            1, dtype=torch.int32, device=device
        )  # set by a step for which a sequence had no page
        self._overrun_seen = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    def bytes_per_token(self) -> float:
        """Bytes of the pool per token it can hold, over all KV heads, K and V, planes, scales and block means."""
        return self.pool.page_bytes / BLOCK

    def nbytes(self) -> int:
        """Bytes of everything the cache holds on the device."""
        held = [
            *self.pool,
            self.tail,
            self.rings,
            *self.per_sequence.given(),
            self.table.table,
            self.table.lengths,
            self.budget,
        ]
        books = 0 if self.residual_slots is None else self.residual_slots.nbytes()
        return books + sum(x.numel() * x.element_size() for x in held)

    # -- growing -------------------------------------------------------------------------------------------------------

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        lengths: list[int] | None = None,
        queries: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Append new tokens to every sequence.

        Args:
            k: ``[B, Hkv, T, D]`` in the dtype and on the device of the cache.
            v: the shape of ``k``.
            lengths: sequence b appends its first ``lengths[b]`` tokens, 0 to T; all T by default.
            queries: ``[B, Hq, T, D]`` of the new tokens. Where ``residual_share`` is below 1 they decide which blocks keep
                their residual; without them that is the newest, until `attend` has seen others. Not for tokens that `attend`
                takes next, which counts its own.
            scale: factor of the logits of ``queries``; 1/sqrt(D) by default.

        Raises:
            ValueError: shapes or lengths that do not fit, more tokens than a sequence may have.
            TypeError: another dtype.
            RuntimeError: the pool is exhausted, and nothing has been written then; or a graph is captured that would need
                pages, or lengths.
        """
        self._check_tokens("k", k)
        self._check_tokens("v", v)
        count = k.shape[2]
        if v.shape != k.shape or k.shape != (self.batch, self.kv_heads, count, self.head_dim):
            want = f"[{self.batch}, {self.kv_heads}, T, {self.head_dim}]"
            raise ValueError(f"k and v must have shape {want}, got {list(k.shape)} and {list(v.shape)}")
        if queries is not None:
            self._check_tokens("queries", queries)
            self._check_queries("queries", queries, count)
        scale, _, _ = checked_logits(scale, None, None, self.head_dim)
        new = [count] * self.batch if lengths is None else whole_numbers("lengths", lengths, each="a length")
        if len(new) != self.batch or any(not 0 <= n <= count for n in new):
            raise ValueError(f"lengths must be {self.batch} numbers from 0 to {count}, got {new}")
        with self._lock:
            self._changes.check()
            self._check_overrun()
            wanted = [self.table.tokens(seq) + n for seq, n in enumerate(new)]
            if self._capturing():
                self._append_captured(k, v, wanted, lengths)
                return
            self._check_room(wanted)
            with self._changing():
                self._reserve(wanted)
                if queries is not None and count <= BLOCK:
                    for seq, n in enumerate(new):
                        note_queries(self, seq, queries[seq, :, :n], scale)
                    queries = None  # a block that a step completes begins without past mass
                if self.backend == "triton" and count <= BLOCK:
                    counts = None if lengths is None else torch.tensor(new, dtype=torch.int32).to(self.device)
                    self._append_step(k, v, counts)
                    self._note(new)
                    return
                for seq, n in enumerate(new):
                    if n:
                        own = None if queries is None else queries[seq, :, :n]
                        self._append_seq(seq, k[seq, :, :n], v[seq, :, :n], own, scale)
                for seq, tokens in enumerate(wanted):  # all sequences have grown, or none
                    if new[seq]:
                        self.table.set_tokens(seq, tokens)

    def _append_captured(self, k: Tensor, v: Tensor, wanted: list[int], lengths: list[int] | None) -> None:
        """Record a step in the graph that is being captured: only what needs nothing of the host."""
        if lengths is not None or k.shape[2] > BLOCK:
            raise RuntimeError(
                f"a captured step appends at most {BLOCK} tokens, as many to every sequence; got {k.shape[2]} tokens and "
                f"lengths {lengths}"
            )
        if missing := self.table.missing(wanted):
            raise RuntimeError(f"a captured step would need {missing} more pages: call reserve() before the capture")
        self._append_step(k, v, None)

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _append_step(self, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
        from thrift_attn.decode import ops

        ops.append(k, v, self.tensors(), self.numerics, counts=counts)

    def _append_seq(self, seq: int, k: Tensor, v: Tensor, queries: Tensor | None, scale: float) -> None:
        """Append ``[Hkv, T, D]`` to one sequence: top up the incomplete block, pack whole blocks, keep the rest.

        Its length is for the caller to set, when all sequences are written.
        """
        start = self.table.tokens(seq)
        stop = start + k.shape[1]
        first, complete = start // BLOCK, stop // BLOCK
        kv = torch.stack([k, v])  # [2, Hkv, T, D]
        if complete > first:
            if start % BLOCK:  # the incomplete block fills up
                kv = torch.cat([self._tail_of(seq, first)[:, :, : start % BLOCK], kv], 2)
            whole = kv[:, :, : (complete - first) * BLOCK]
            slots = admit_blocks(self, seq, whole[0], queries, scale)
            blocks = whole.unflatten(2, (-1, BLOCK)).transpose(1, 2)  # [2, n, Hkv, 64, D]
            self._pack(seq, first, blocks, slots)
            for block in range(max(first, complete - 2), complete):
                self._tail_of(seq, block).copy_(blocks[:, block - first])
                self._tail_blocks[seq][block % 2] = block
            kv = kv[:, :, (complete - first) * BLOCK :]
        elif queries is not None:
            note_queries(self, seq, queries, scale)
        if kv.shape[2]:
            at = stop % BLOCK - kv.shape[2]
            self._tail_of(seq, complete)[:, :, at : stop % BLOCK] = kv
            self._tail_blocks[seq][complete % 2] = complete

    def _pack(self, seq: int, first: int, blocks: Tensor, slots: Tensor | None) -> None:
        """Pack ``[2, n, Hkv, 64, D]`` (K and V) into the pages of the blocks from ``first`` on.

        Args:
            seq: the sequence.
            first: number of the first block.
            blocks: K and V.
            slots: int64 ``[n, Hkv]``, of residuals (`admit_blocks`).
        """
        if first == 0 and blocks.shape[1] > 1:  # others are packed by the scales that the first block brings
            self._pack(seq, 0, blocks[:, :1], None if slots is None else slots[:1])
            first, blocks, slots = 1, blocks[:, 1:], None if slots is None else slots[1:]
        pages = self.table.table[seq, first : first + blocks.shape[1]]
        if self.backend == "triton":
            from thrift_attn.decode.pack import pack_blocks

            seqs, numbers = (torch.full_like(pages, n) for n in (seq, first))
            pack_blocks(
                blocks[0], blocks[1], pages, cache=self.tensors(), numerics=self.numerics, seqs=seqs, numbers=numbers,
                slots=None if slots is None else slots.int().contiguous(),
            )  # fmt: skip
        else:
            write_blocks(
                self.pool, pages.long(), blocks[0], blocks[1],
                numerics=self.numerics, sequence=self._sequence(seq), first=first == 0, slots=slots,
            )  # fmt: skip

    # -- reading -------------------------------------------------------------------------------------------------------

    def widen(self, room: int = 0, *, start: int = 0, most: int | None = None) -> tuple[Tensor, Tensor]:
        """K and V of all sequences in 16 bits, from the plane of high precision, for attention of many new tokens.

        Args:
            room: tokens of room behind the longest sequence.
            start: the first token, a multiple of 64.
            most: most tokens of a sequence, a multiple of 64; all by default.

        Returns:
            K and V ``[B, Hkv, longest + room, D]`` in the dtype of the cache, 0 behind the end of a sequence; ``longest`` is
            what the longest sequence has of the tokens that are asked for.

        Raises:
            ValueError: a tile that does not begin and end where blocks do, or less than no room.
        """
        room, start = whole_number("room", room), whole_number("start", start)
        most = None if most is None else whole_number("most", most)
        if room < 0:
            raise ValueError(f"room must be at least 0 tokens, got {room}")
        if start % BLOCK or start < 0 or (most is not None and (most % BLOCK or most < 0)):
            raise ValueError(
                f"a tile must start and end at multiples of {BLOCK}, got {start} and {most} tokens from there"
            )
        with self._reading():
            self._changes.check()
            longest = max(0, max(self.table.tokens(seq) for seq in range(self.batch)) - start)
            longest = longest if most is None else min(longest, most)
            shape = (2, self.batch, self.kv_heads, longest + room, self.head_dim)
            out = torch.zeros(shape, dtype=self.dtype, device=self.device)
            if self.backend == "triton":
                from thrift_attn.decode.gather import gather_pages

                tile = {"tokens": longest, "start": start}
                gather_pages(out[0], out[1], cache=self.tensors(), numerics=self.numerics, **tile)
            else:
                for seq in range(self.batch):
                    for which, x in enumerate(self.read(seq, start, start + longest)):
                        out[which, seq, :, : x.shape[1]] = x
            return out[0], out[1]

    def attend(
        self,
        q: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of the newest tokens of every sequence over all it holds.

        Append the K and V of the new tokens first: query i of a sequence sits at position length - Tq + i.

        Args:
            q: ``[B, Hq, Tq, D]`` in the dtype of the cache; Tq is 1 to 16, Hkv divides Hq.
            scale: factor of the logits; 1/sqrt(D) by default.
            window: sliding window in tokens.
            softcap: logits become softcap * tanh(logits / softcap).
            return_lse: also return the log-sum-exp, natural logarithm, float32 ``[B, Hq, Tq]``.

        Returns:
            The output ``[B, Hq, Tq, D]``; zeros, and LSE -inf, for a sequence without tokens.

        Raises:
            ValueError: shapes that do not fit, options out of range.
            TypeError: another dtype, or a window that is no int.
        """
        self._check_tokens("q", q)
        self._check_queries("q", q)
        if not 1 <= q.shape[2] <= DECODE_ROWS:
            raise ValueError(f"decode takes 1 to {DECODE_ROWS} new tokens, got {q.shape[2]}")
        scale, window, softcap = checked_logits(scale, window, softcap, self.head_dim)
        with self._reading():
            self._changes.check()
            if self.backend == "triton":
                from thrift_attn.decode import ops

                out, lse = ops.attend(q, self.tensors(), self.numerics, scale=scale, window=window, softcap=softcap)
            else:
                out, lse = self._attend_reference(q, scale, window, softcap)
        return (out, lse) if return_lse else out

    def warm_up(self, q_heads: int, new_tokens: tuple[int, ...] = (1,)) -> None:
        """Compile the kernels for steps of so many new tokens now rather than in the first step; nothing on a CPU.

        Args:
            q_heads: query heads Hq.
            new_tokens: numbers of new tokens per step, each 1 to 16.

        Raises:
            ValueError: no multiple of the KV heads, or a number of new tokens out of range.
        """
        q_heads = positive("q_heads", q_heads)
        steps = whole_numbers("new_tokens", new_tokens, each="new_tokens")
        if q_heads % self.kv_heads:
            raise ValueError(f"q_heads must be a multiple of {self.kv_heads}, got {q_heads}")
        if not all(1 <= n <= DECODE_ROWS for n in steps):
            raise ValueError(f"new_tokens must be numbers from 1 to {DECODE_ROWS}, got {steps}")
        if self.backend == "triton":
            from thrift_attn.decode import ops

            ops.warm_up(self.tensors(), self.numerics, q_heads=q_heads, new_tokens=tuple(steps))

    def tensors(self) -> CacheTensors:
        """Return what the cache holds on the device, as the kernels of decode take it (`thrift_attn.decode.tensors`)."""
        self.table.note_use()
        return CacheTensors(
            base=self.pool.base,
            k_block_mean=self.pool.k_block_mean,
            high=self.pool.high,
            tail=self.tail,
            rings=self.rings,
            page_table=self.table.table,
            lengths=self.lengths,
            budget=self.budget,
            overrun=self.overrun,
            residents=None if self.residual_slots is None else self.residual_slots.tensors,
            promotes_all=self._promotes_all,
            **self.per_sequence._asdict(),
        )

    def _attend_reference(
        self, q: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float32, device=q.device)
        for seq in range(self.batch):
            tokens = self.table.tokens(seq)
            if tokens:
                mask = reference.Mask(q.shape[2], tokens, True, window)
                result = reference.attend_planes(q[seq], self._planes(seq), self.numerics, mask, scale, softcap)
                out[seq], lse[seq] = result[0].to(q.dtype), result[1]
                note_step(self, seq, q[seq], scale)
        return out, lse

    def _planes(self, seq: int) -> reference.Planes:
        """One sequence as the reference sees it: pages, then the incomplete block, exact on both paths."""
        tokens, pages = self.table.tokens(seq), self.table.pages(seq)
        kept = self._tail_of(seq, tokens // BLOCK)[:, :, : tokens % BLOCK]
        others = self.per_sequence.block0_mean[seq] if self.numerics.exact_sink and tokens >= BLOCK else None
        resident = None if self.residual_slots is None else self.residual_slots.of_pages(pages) >= 0
        return sequence_planes(self._read(seq, pages, 0), kept, block0_mean=others, resident=resident)

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_queries(self, name: str, q: Tensor, tokens: int | None = None) -> None:
        batch, heads, count, dim = q.shape
        fits = (batch, dim) == (self.batch, self.head_dim) and heads and not heads % self.kv_heads
        if not fits or (tokens is not None and tokens != count):
            want = (
                f"[{self.batch}, a multiple of {self.kv_heads}, {'Tq' if tokens is None else tokens}, {self.head_dim}]"
            )
            raise ValueError(f"{name} must have shape {want}, got {list(q.shape)}")

    def _check_tokens(self, name: str, x: Tensor) -> None:
        check_strided(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, H, T, D], got shape {list(x.shape)}")
        if x.dtype != self.dtype:
            raise TypeError(f"{name} must have the dtype of the cache, {self.dtype}, got {x.dtype}")
        check_no_gradients(x)
        if x.device != self.device:
            raise ValueError(f"{name} must be on the device of the cache, {self.device}, got {x.device}")
