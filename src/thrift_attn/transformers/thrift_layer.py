"""One full-attention layer of a `ThriftCache`: pages, the new tokens on their way into them, and attention over both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from thrift_attn.cache import PagedThriftCache
from thrift_attn.cache.changes import Changes
from thrift_attn.config import BLOCK, DECODE_ROWS, ThriftConfig
from thrift_attn.dispatch import Served
from thrift_attn.reference.budget import asked_in_decode
from thrift_attn.stats import Stats
from thrift_attn.transformers.dense import as_given, attend_counted, autocast_dtype, check_no_gradients, with_sinks
from thrift_attn.transformers.layer_state import LayerState
from thrift_attn.transformers.lazy_kv import PendingKV, made_for
from thrift_attn.transformers.padding import MaskReader, Padding, gather, spread

RESET = "call reset() and start again"
"""What to do about a `ThriftCache` that was interrupted halfway."""

REFUSALS = (ValueError, TypeError, NotImplementedError)
"""Errors that tell of wrong arguments, before anything is changed."""


@dataclass(frozen=True)
class CacheOptions:
    """The options of a `ThriftCache`, which are those of all its layers; see there."""

    max_tokens: int
    pool_tokens: int | None
    decode: ThriftConfig
    prefill: ThriftConfig | None

    @property
    def prompts(self) -> ThriftConfig:
        """What prompts are attended with; by default what the device is fast at, with the budget of decode."""
        return self.prefill or ThriftConfig(budget=self.decode.budget)


class ThriftLayer(CacheLayerMixin):
    """One full-attention layer of a `ThriftCache`.

    A slot is a position of the batch as transformers counts, padding included. New K and V are pending until attention,
    which knows what is padding, or anything else looks at them; they count from the beginning.

    Args:
        options: of the cache.
        reader: of masks, shared by the layers of a cache.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, options: CacheOptions, reader: MaskReader):
        super().__init__()
        self.options, self.reader = options, reader
        self.batch_size = 0
        self.slots = 0
        """Slots that are written."""
        self.paddings: list[Padding] = []
        self.state: LayerState | None = None
        """That of the attention module which has looked at the tokens."""
        self.changes = Changes(RESET, REFUSALS)
        """Of pages, slots and padding, which belong together."""
        self._pending: PendingKV | None = None
        self._paged: PagedThriftCache | None = None

    @property
    def paged(self) -> PagedThriftCache:
        """The pages, with all tokens in them. Raises RuntimeError before the first token."""
        self.settle()
        return self._pages()

    def _pages(self) -> PagedThriftCache:
        if self._paged is None:
            raise RuntimeError("the cache is empty: its pages are made when the first tokens arrive")
        self.changes.check()
        return self._paged

    # -- new tokens ----------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pages, for the batch, heads, dtype and device of the first tokens."""
        batch, heads, _, dim = key_states.shape
        if key_states.shape[:2] != value_states.shape[:2] or dim != value_states.shape[3]:
            raise NotImplementedError(
                f"ThriftCache holds K and V of one shape, got {list(key_states.shape)} and {list(value_states.shape)}"
            )
        sizes = self.options
        max_pages = -(-sizes.max_tokens // BLOCK)
        pages = batch * max_pages if sizes.pool_tokens is None else -(-sizes.pool_tokens // BLOCK)
        with torch.inference_mode(False):  # its tensors are written to in any mode
            paged = PagedThriftCache(
                batch=batch,
                kv_heads=heads,
                head_dim=dim,
                num_pages=pages,
                max_pages=max_pages,
                max_tokens=sizes.max_tokens,
                config=sizes.decode,
                dtype=key_states.dtype,
                device=key_states.device,
            )
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        self.is_initialized, self._paged = True, paged

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new K and V ``[B, Hkv, T, D]``; they are written when attention, or another operation, looks at them.

        Raises:
            ValueError: another shape than that of the tokens before.
            TypeError: another dtype.
            NotImplementedError: gradients.
        """
        check_no_gradients(key_states, value_states)
        if (dtype := autocast_dtype(key_states.device)) is not None:
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        self.settle()
        if self._paged is not None and self.slots == 0 and not made_for(self._paged, key_states):
            self.discard()  # emptied by `reset`: the next tokens may be of another batch, model or dtype
        if self._paged is None:
            self.lazy_initialization(key_states, value_states)
        paged = self._pages()
        want = (paged.batch, paged.kv_heads, key_states.shape[2], paged.head_dim)
        if key_states.shape != want or value_states.shape != want:
            got = f"{list(key_states.shape)} and {list(value_states.shape)}"
            raise ValueError(f"K and V must have shape {list(want)} like the tokens before them, got {got}")
        if (key_states.dtype, value_states.dtype) != (paged.dtype, paged.dtype):
            raise TypeError(
                f"K and V must have the dtype of the cache, {paged.dtype}, got {key_states.dtype} and {value_states.dtype}"
            )
        self._pending = PendingKV(self, key_states, value_states, self.slots)
        return self._pending.handles()

    @property
    def is_intact(self) -> bool:
        """Whether no change was interrupted halfway."""
        return not self.changes.unfinished and (self._paged is None or self._paged.is_intact)

    @property
    def is_pending(self) -> bool:
        """Whether there are new tokens that no attention has looked at."""
        return self._pending is not None

    def settle(self) -> None:
        """Write pending tokens that no attention has looked at; all of them are tokens then."""
        if self._pending is not None:
            self._write(self._pending, None)

    def check_room(self, new: list[int]) -> None:
        """Raise ValueError if a sequence would be longer than ``max_tokens`` with so many more tokens."""
        paged, limit = self._pages(), self.options.max_tokens
        for seq, n in enumerate(new):
            if n and (total := paged.tokens(seq) + n) > limit:
                raise ValueError(f"sequence {seq} would have {total} tokens, more than max_tokens={limit}")

    def drop(self, pending: PendingKV) -> None:
        """Forget new tokens of a call that failed, unless they are written."""
        if self._pending is pending:
            self._pending = None

    def _write(
        self, pending: PendingKV, padding: Padding | None, queries: Tensor | None = None, scale: float | None = None
    ) -> None:
        """Write new tokens without padding into the pages, unless they are there; queries say which blocks stay refined."""
        if pending.written:
            return
        paged, k, v = self._pages(), pending.k, pending.v
        new = [pending.count] * paged.batch if padding is None else padding.counts
        self.check_room(new)
        if not _capturing(k):
            paged.reserve(new)  # nothing is half done without room
        if padding is not None:
            k, v = (gather(x, padding.left()) for x in (k, v))
            queries = None if queries is None else gather(queries, padding.left())
        with self.changes:
            paged.append(k, v, lengths=None if padding is None else new, queries=queries, scale=scale)
            if not _capturing(k):
                self.slots += pending.count
                if padding is not None:
                    self.paddings.append(padding)
            pending.written, self._pending = True, None

    def _check_order(self, pending: PendingKV) -> None:
        """Raise RuntimeError if the layer holds other tokens by now than when the new ones came."""
        now = self.slots if pending.written else self.slots + pending.count
        if now != pending.held + pending.count and not _capturing(pending.k):
            raise RuntimeError(
                f"K and V of {pending.held + pending.count} slots are looked at after the cache has changed to {now}"
            )

    # -- attention -----------------------------------------------------------------------------------------------------

    def why_not(self, pending: PendingKV, query: Tensor, tokens: Tensor | None) -> str | None:
        """Why `attend` cannot serve a call; None if it can.

        Args:
            pending: the new tokens.
            query: ``[B, Hq, Tq, D]``.
            tokens: bool ``[B, slots]``, True at tokens, or None if all new slots are tokens.

        Raises:
            ValueError: the mask shows more tokens than the sequences hold.
        """
        if query.shape[2] != pending.count:
            return f"{query.shape[2]} queries for {pending.count} new tokens"
        if tokens is None:
            return None
        shown, there = self.reader.read(tokens, pending.held, pending.count).shown, self._before(pending)
        if any(seen > own for seen, own in zip(shown, there, strict=True)):
            raise ValueError(f"the attention mask shows {shown} tokens before the new ones, the cache holds {there}")
        return None if shown == there else "the mask hides tokens that the cache holds"

    def attend(
        self, pending: PendingKV, query: Tensor, tokens: Tensor | None, *, counted: bool, backend: str, **options: Any
    ) -> tuple[Tensor, Stats, Served | None]:
        """Attention of the new tokens over all that the layer holds, which they now belong to.

        Args:
            pending: the new tokens.
            query: ``[B, Hq, T, D]``.
            tokens: as in `why_not`, which must have returned None.
            counted: whether to count what more than 16 new tokens promote; for fewer it is known on the host.
            backend: for `thrift_attn.attention`.
            **options: ``scale`` and ``softcap`` of the logits, ``sinks`` as in `thrift_attn.transformers.dense.with_sinks`.

        Returns:
            The output ``[B, Hq, T, D]``, 0 at padding, what was promoted, and what ran (None: the pages were attended).

        Raises:
            ValueError: a sequence would be longer than the cache allows.
            RuntimeError: the pages are exhausted; nothing has been written.
        """
        self._check_order(pending)
        paged, count = self._pages(), pending.count
        padding = self._padding(pending, tokens)
        new = [count] * paged.batch if padding is None else padding.counts
        before = self._before(pending)
        totals = [old + n for old, n in zip(before, new, strict=True)]
        if padding is None and count <= DECODE_ROWS and any(before):
            self._write(pending, None)
            sinks = options.pop("sinks")
            with as_given(query.device):
                out, lse = paged.attend(query, return_lse=True, **options)
                out = out if sinks is None else with_sinks(out, lse, sinks)
            return out, self.decode_stats(query.shape[1], count), None
        if not pending.written:  # nothing is computed without room
            self.check_room(new)
            paged.reserve(new)
        options |= {"config": self.options.prompts, "backend": backend}
        k, v, given = pending.k, pending.v, query
        if padding is not None:
            query = gather(query, padding.right())
            k, v = (gather(x, padding.left()) for x in (k, v))
        if any(before):
            k, v = paged.widen() if pending.written else self._behind(k, v, before)
        if padding is not None or len(set(totals)) > 1:
            options["kv_lengths"] = torch.tensor(totals, device=query.device).clamp(min=1)
        out, stats, served = attend_counted(query, k, v, counted, **options)
        self._write(pending, padding, given, options.get("scale"))
        if padding is not None:
            out = gather(out, padding.right().argsort(dim=1))
            out = out.masked_fill(~padding.is_token[:, None, :, None], 0)
        return out, stats, served

    def full(self, pending: PendingKV, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """K and V of all slots in 16 bits; the new tokens now belong to the layer.

        Args:
            pending: the new tokens.
            tokens: as in `why_not`.

        Returns:
            K and V ``[B, Hkv, S, D]``, 0 at padding.
        """
        if pending.widened is None:
            self._check_order(pending)
            padding = self._padding(pending, tokens)
            k, v = pending.k, pending.v
            if pending.written or pending.held:
                k, v = (spread(x, self.slot_map()) for x in self._pages().widen())
                if not pending.written:
                    k, v = torch.cat([k, pending.k], 2), torch.cat([v, pending.v], 2)
            self._write(pending, padding)
            pending.widened = k, v
        return pending.widened

    def _padding(self, pending: PendingKV, tokens: Tensor | None) -> Padding | None:
        """The padding among new tokens."""
        if tokens is None:
            return None
        return self.reader.read(tokens, pending.held, pending.count).padding

    def _before(self, pending: PendingKV) -> list[int]:
        """Tokens of each sequence before the new ones."""
        paged = self._pages()
        there = [paged.tokens(seq) for seq in range(paged.batch)]
        if not pending.written:
            return there
        last = self.paddings[-1] if self.paddings else None
        new = last.counts if last is not None and last.start == pending.held else [pending.count] * paged.batch
        return [total - n for total, n in zip(there, new, strict=True)]

    def _behind(self, k: Tensor, v: Tensor, before: list[int]) -> tuple[Tensor, Tensor]:
        """New K and V behind the tokens that each sequence holds."""
        count = k.shape[2]
        wide = self._pages().widen(room=count)
        at = torch.tensor(before, device=k.device)[:, None] + torch.arange(count, device=k.device)
        index = at[:, None, :, None].expand_as(k)
        return wide[0].scatter_(2, index, k), wide[1].scatter_(2, index, v)

    def decode_stats(self, heads: int, new_tokens: int = 1) -> Stats:
        """Complete blocks seen and promoted by one step of decode.

        Args:
            heads: query heads.
            new_tokens: tokens of the step, which the layer holds by now.
        """
        budget, paged = self.options.decode.budget, self.paged
        totals = [paged.tokens(seq) for seq in range(paged.batch)]
        seen = sum(tokens // BLOCK for tokens in totals)
        promoted = sum(paged.promoted(seq, new_tokens) for seq in range(paged.batch))
        asked = sum(asked_in_decode(budget, tokens, new_tokens=new_tokens) for tokens in totals)
        return Stats(heads * seen, heads * promoted, heads * asked)

    # -- what transformers asks ----------------------------------------------------------------------------------------

    def tokens(self, seq: int) -> int:
        """Tokens of a sequence, without padding."""
        return 0 if self._paged is None else self.paged.tokens(seq)

    def slot_map(self) -> Tensor | None:
        """bool ``[B, slots]``, True at tokens; None if there is no padding."""
        if not self.paddings:
            return None
        found = torch.ones(self._pages().batch, self.slots, dtype=torch.bool, device=self.device)
        for padding in self.paddings:
            found[:, padding.start : padding.start + padding.is_token.shape[1]] = padding.is_token
        return found

    def get_seq_length(self) -> int:
        """Slots."""
        return self.slots + (0 if self._pending is None else self._pending.count)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Slots after the new tokens, and the first of them; transformers 5.0 gives positions, later a number."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        """Most tokens of a sequence."""
        return self.options.max_tokens

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def reset(self) -> None:
        """Give all pages back; they stay allocated for the next sequences."""
        self.changes.unfinished = True  # until all of it is done
        self._pending = None
        if self._paged is not None and not self._paged.is_intact:
            self.discard()
        if self._paged is not None:
            for seq in range(self._paged.batch):
                self._paged.free(seq)
        self.slots, self.paddings = 0, []
        self.changes.unfinished = False

    def discard(self) -> None:
        """Drop the pages; they are made anew, for their shape and dtype, when the next tokens arrive."""
        self._paged, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take slots back from the end: ``-n`` takes n, and ``n``, as in transformers 5.0, leaves n."""
        keep = self.get_seq_length() + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self.keep(max(0, keep))

    def keep(self, slots: int) -> None:
        """Keep the first ``slots`` slots."""
        if slots <= self.slots:
            self._pending = None
        if slots >= self.get_seq_length() or self._paged is None:
            return
        self.settle()
        found = self.slot_map()
        left = [slots] * self._paged.batch if found is None else found[:, :slots].sum(1).tolist()
        with self.changes:
            for seq, tokens in enumerate(left):
                self._paged.truncate(seq, tokens)
            kept = [padding for padding in self.paddings if padding.start < slots]
            self.paddings = []
            for padding in kept:
                is_token = padding.is_token[:, : slots - padding.start]
                self.paddings.append(Padding(padding.start, is_token, is_token.sum(1).tolist()))
            self.slots = slots

    def select(self, seqs: list[int]) -> None:
        """Make sequence i what sequence ``seqs[i]`` was; equal ones share their complete blocks."""
        if self._paged is None:
            return
        paged = self.paged
        with self.changes:
            with torch.inference_mode(False):
                paged.select(seqs)
            index = torch.tensor(seqs, device=self.device)
            self.paddings = [
                Padding(padding.start, padding.is_token[index], [padding.counts[seq] for seq in seqs])
                for padding in self.paddings
            ]
            self.batch_size = len(seqs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put sequences in another order, some perhaps several times."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every sequence ``repeats`` times."""
        self.select([seq for seq in range(self.batch_size) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        seqs = torch.arange(self.batch_size)[torch.as_tensor(indices).cpu()]
        self.select(seqs.tolist())

    def offload(self) -> None:
        """Refuse: pages stay where they are."""
        raise NotImplementedError("ThriftCache does not move pages to the CPU")

    def fork(self, reader: MaskReader) -> ThriftLayer:
        """The same tokens over the same pages, for another cache."""
        self.changes.check()
        self.settle()
        other: ThriftLayer = type(self)(self.options, reader)
        mine = {name: value for name, value in vars(self).items() if name not in ("options", "reader", "_paged")}
        for name, value in mine.items():
            setattr(other, name, value)
        other.paddings, other.changes = list(self.paddings), self.changes.anew()
        with torch.inference_mode(False):  # its tensors are written to in any mode
            other._paged = None if self._paged is None else self._paged.branch()
        return other


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
