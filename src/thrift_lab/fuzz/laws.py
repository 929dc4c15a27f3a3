"""The laws of a fuzz: what must hold of caches after every operation."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thrift_attn.cache import PagedThriftCache, state
from thrift_attn.config import BLOCK
from thrift_lab.fuzz.settings import Setting
from thrift_lab.fuzz.shadow import Sequence, as_fresh, attend_some, dense, picture, resident_blocks, same

PATIENCE = 30.0
"""Seconds after which a thread counts as stuck."""


class Finding(AssertionError):
    """A law that does not hold."""


@dataclass
class Member:
    """A cache and what it should hold.

    Args:
        cache: the cache.
        seqs: its sequences.
        pictures: what it held of each of them when last looked at.
    """

    cache: PagedThriftCache
    seqs: tuple[Sequence, ...]
    pictures: list[list[Tensor]] = field(default_factory=list)

    def look(self) -> None:
        """Take pictures of all sequences."""
        self.pictures = [picture(self.cache, seq) for seq in range(len(self.seqs))]


def check_lock(cache: PagedThriftCache) -> None:
    """Another thread must be able to ask the cache for something."""

    def ask() -> None:
        try:
            cache.read(0)
        except RuntimeError:
            if cache.is_intact:
                raise

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        raise Finding("after an interrupt another thread waits for ever")


def check_refuses(cache: PagedThriftCache, setting: Setting, name: str) -> None:
    """A cache that is not intact must refuse everything that looks at it or changes it."""
    k, v = setting.tokens(cache.batch, 1, 0, "plain")
    calls: dict[str, Callable[[], Any]] = {
        "append": lambda: cache.append(k, v),
        "attend": lambda: cache.attend(setting.queries(cache.batch, 1, 0)),
        "read": lambda: cache.read(0),
        "widen": cache.widen,
        "branch": cache.branch,
        "free": lambda: cache.free(0),
        "select": lambda: cache.select([0]),
        "reserve": lambda: cache.reserve(1),
        "state_dict": lambda: state.state_dict(cache),
    }
    for what, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            if "interrupted" in str(error):
                continue
        raise Finding(f"{name} was interrupted, the cache says that it is broken, and {what} goes on")


def check_left_alone(member: Member, seqs: Iterable[int], name: str) -> None:
    """Sequences that an operation was not about are bit for bit what they were."""
    for seq in seqs:
        if not same(picture(member.cache, seq), member.pictures[seq]):
            raise Finding(f"{name} has changed sequence {seq}, which it should have left alone")


def check_content(member: Member, seq: int) -> None:
    """A sequence must look as in a fresh cache that got its tokens at once, but for residuals that it has not kept."""
    sequence = member.seqs[seq]
    if not as_fresh(member.cache, seq, sequence):
        raise Finding(f"sequence {seq} of {sequence.tokens} tokens is not what a fresh cache holds of them")
    if sequence.finite:
        _check_precision(member, seq)


SMALLEST = 0.012
"""Absolute error where the scales of groups run out below; times powers of two."""

LARGEST = {"nvfp4": 448 * 6.0, "mxfp4": 2.0**8 * 6.0}
"""The largest element that pages reach, times powers of two: scales end at 448, and those of mxfp4 in pages at 2^8.

A block with a larger one saturates, and all of a group with it in mxfp4: a known limit of blocks that are some hundred times
larger than the first of their sequence, which always fits (docs/method.md, section 8).
"""


def _check_precision(member: Member, seq: int) -> None:
    """What a cache reads is what was appended: the newest tokens and 16-bit copies exactly, the rest nearly."""
    sequence, cache = member.seqs[seq], member.cache
    of_seq = cache.per_sequence
    resident = resident_blocks(cache, seq).T[..., None, None]  # [Hkv, n, 1, 1]
    powers = [None if x is None else x[seq].double() for x in (of_seq.k_channel_scale, of_seq.v_head_scale)]
    for name, power, got, want in zip("KV", powers, cache.read(seq), (sequence.k, sequence.v), strict=True):
        whole = sequence.tokens // BLOCK * BLOCK
        if not torch.equal(got[:, whole:], want[:, whole:]):
            raise Finding(f"{name} of the newest of {sequence.tokens} tokens is not what was appended")
        blocks, read = (x[:, :whole].double().unflatten(1, (-1, BLOCK)) for x in (want, got))
        delta = blocks
        if name == "K" and cache.numerics.centred:
            centre = blocks.mean(2, keepdim=True)
            if cache.numerics.exact_sink:
                centre[:, :1] = blocks[:, :1, :1]
            delta = blocks - centre
        factor = torch.ones((), dtype=torch.float64) if power is None else power.reshape(len(power), 1, 1, -1)
        scaled = (delta * factor).abs()
        # One rounding to a format of at least 1.5 bits, or a second one of 3 bits under the same scale.
        peak = scaled.amax((2, 3), keepdim=True)
        coarse = peak * torch.where(resident, 1 / 8, 1 / 2)
        beyond = peak > LARGEST[cache.config.base_format]
        beyond[:, :1] = False
        allowed = coarse + SMALLEST + torch.where(beyond, 2 * peak, 0)
        allowed = allowed / factor + blocks.abs() * 2**-7
        if cache.config.promoted_storage == "16bit":
            allowed = torch.where(resident, 0, allowed)
        if ((read - blocks).abs() > allowed).any():
            worst = ((read - blocks).abs() / allowed).max()
            raise Finding(
                f"{name} of {sequence.tokens} tokens is read {worst:.3g} times worse than its formats explain"
            )


def _by_pool(members: Iterable[Member]) -> Iterable[list[Member]]:
    """Members by the pool that their caches share."""
    pools: dict[int, list[Member]] = {}
    for member in members:
        pools.setdefault(member.cache.pool.base.data_ptr(), []).append(member)
    return pools.values()


def check_pools(members: Iterable[Member], leaky: bool) -> None:
    """Every page of a pool is used or free.

    Args:
        members: all caches.
        leaky: whether pages may be lost, as after an interrupt; none may ever be both.
    """
    for sharers in _by_pool(members):
        caches = [member.cache for member in sharers]
        tables = torch.cat([cache.table.table.flatten() for cache in caches])
        used = len(tables[tables >= 0].unique())
        free, total = caches[0].table.free_pages, len(caches[0].pool.base)
        if used + free > total or (used + free < total and not leaky):
            raise Finding(f"of {total} pages {used} are used and {free} are free")


def check_slots(members: Iterable[Member], leaky: bool) -> None:
    """Every slot for residuals is used, by as many sequences as it is counted for, or free, and holds a block of each head.

    Args:
        members: all caches.
        leaky: whether slots may be lost, as after an interrupt; none may ever be both.
    """
    for sharers in _by_pool(member for member in members if member.cache.residual_slots is not None):
        books = [x for x in (member.cache.residual_slots for member in sharers) if x is not None]
        uses = Counter(slot for each in books for held in each._owned for slot in held)
        free, total = books[0]._free, len(books[0].tensors.block_of_slot)
        counted = {slot: count for slot, count in enumerate(books[0]._references) if count}
        if set(free) & set(uses) or len(set(free)) != len(free) or (uses != counted and not leaky):
            raise Finding(f"of {total} slots {free} are free and {counted} are counted, used are {dict(uses)}")
        if len(uses) + len(free) < total and not leaky:
            raise Finding(f"of {total} slots {len(uses)} are used and {len(free)} are free")
        block_in: dict[tuple[int, int], int] = {}  # by slot and head: the page whose block lies there
        for member in sharers:
            for seq in range(member.cache.batch):
                _check_residents(member, seq, block_in, lost=leaky)


def _check_residents(member: Member, seq: int, block_in: dict[tuple[int, int], int], *, lost: bool) -> None:
    """The residents of a sequence lie in slots of its own, one in each, and are no more than its quota.

    Where slots may be lost (``lost``), some count as shared for ever, and those of its own are the bound.
    """
    cache, sequence = member.cache, member.seqs[seq]
    assert cache.residual_slots is not None
    tensors, owned = cache.residual_slots.tensors, cache.residual_slots._owned[seq]
    pages = cache.table.pages(seq)
    lies_in = cache.residual_slots.of_pages(pages)
    for block, head in (lies_in >= 0).nonzero().tolist():
        slot, page = int(lies_in[block, head]), int(pages[block])
        if slot not in owned or int(tensors.block_of_slot[slot, head]) != block:
            raise Finding(f"block {block} of sequence {seq} lies in slot {slot}, it has {owned}")
        if block_in.setdefault((slot, head), page) != page:
            raise Finding(f"head {head} has two blocks in slot {slot}")
    told = tensors.slots[seq, : len(owned)].tolist(), tensors.bounds[seq].tolist()
    if told[0] != owned or told[1] != cache.residual_slots._bounds[seq] or told[1][1] != len(owned):
        raise Finding(f"sequence {seq} has the slots {owned}, its device knows of {told}")
    count = max((lies_in >= 0).sum(0).tolist(), default=0)
    quota = len(owned) if sequence.shared or lost else int(tensors.quota[len(pages)])
    if count > quota:
        raise Finding(f"sequence {seq} of {len(pages)} blocks has {count} residents, its quota is {quota}")


def check_books(member: Member) -> None:
    """Lengths on host and device, and an own page for every complete block."""
    cache, want = member.cache, [x.tokens for x in member.seqs]
    told = [cache.tokens(seq) for seq in range(cache.batch)]
    if told != want or cache.lengths.tolist() != want:
        raise Finding(f"the cache should hold {want} tokens, says {told} and has {cache.lengths.tolist()}")
    for seq, (entries, tokens) in enumerate(zip(cache.table.table.tolist(), want, strict=True)):
        held = [page for page in entries if page >= 0]
        if len(held) < tokens // BLOCK or entries[: len(held)] != held or len(set(held)) != len(held):
            raise Finding(f"sequence {seq} of {tokens} tokens has the pages {entries}")


def check_attention(
    x: Sequence, q: Tensor, out: Tensor, lse: Tensor, options: dict[str, Any], resident: Tensor
) -> None:
    """Attention over one sequence is that of a fresh cache, and where every block is promoted that of float64.

    Args:
        x: the sequence.
        q: ``[Hq, Tq, D]``.
        out: what the cache has made of it, likewise.
        lse: ``[Hq, Tq]``.
        options: ``scale``, ``window`` and ``softcap``.
        resident: bool ``[n, Hkv]``, the complete blocks that keep their residual.
    """
    setting = x.setting
    if not x.tokens:
        if out.any() or not (lse == -torch.inf).all():
            raise Finding("attention over no token is not 0 and -inf")
        return
    twin = x.twin()
    if setting.config.residual_share < 1:
        want, want_lse = (part[None] for part in attend_some(twin, q, resident, options))
    else:
        want, want_lse = twin.attend(q[None].clone(), return_lse=True, **options)
    plain = twin.backend == "reference"
    eps = torch.finfo(setting.torch_dtype).eps
    for name, got, due in (("output", out, want[0]), ("LSE", lse, want_lse[0])):
        close = torch.equal(got.nan_to_num(7.0), due.nan_to_num(7.0)) if plain else _near(got, due, 4 * eps)
        if not close:
            error = (got - due).abs().max()
            raise Finding(f"the {name} of {x.tokens} tokens is not that of a fresh cache: {error:.3g} away")
    if not setting.every_block or not x.finite or not resident.all():
        return
    k, v = (x.k, x.v) if setting.config.promoted_storage == "16bit" else twin.read(0)
    exact, exact_lse, size = dense(q, k, v, options)
    # Products and sums of float32, P in the dtype of the cache where kernels run, and the rounding of the output; what
    # `read` tells of residuals is rounded, too.
    unit = torch.finfo(torch.float32).eps
    rounded = 0 if setting.config.promoted_storage == "16bit" else eps
    logits = ((setting.head_dim + 4) * unit + rounded) * size + (0 if plain else 4 * eps)
    if options.get("softcap"):
        logits = logits + 8 * unit * options["softcap"]
    largest = v.double().abs().amax((-2, -1)).repeat_interleave(setting.group)[:, None]
    weights = 2 * logits + x.tokens * unit
    allowed = (
        (weights[..., None] + rounded) * largest[..., None] + eps * exact.abs() + torch.finfo(setting.torch_dtype).tiny
    )
    if ((out.double() - exact).abs() > allowed).any():
        worst = ((out.double() - exact).abs() / allowed).max()
        raise Finding(
            f"attention over {x.tokens} tokens is {worst:.3g} times further from float64 than rounding explains"
        )
    seen = exact_lse.isfinite()
    if not torch.equal(seen, lse.isfinite()):
        raise Finding("the LSE is not finite where float64 is, or the other way round")
    far = (lse.double() - exact_lse).abs() > logits + (4 + x.tokens) * unit * (1 + exact_lse.abs())
    if far[seen].any():
        raise Finding(f"the LSE of {x.tokens} tokens is off: {lse.tolist()} in place of {exact_lse.tolist()}")


def _near(got: Tensor, want: Tensor, share: float) -> bool:
    """Whether two outputs of kernels agree but for the order of their sums."""
    finite = want.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return False
    got, want = (x.double().where(finite, 0) for x in (got, want))
    return bool((got - want).norm() <= share * want.norm() + 1e-6)
