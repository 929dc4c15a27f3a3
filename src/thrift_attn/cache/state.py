"""What a paged cache holds, as plain tensors, and back: for files and for moving between pools."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from thrift_attn.cache.paged import PagedThriftCache
from thrift_attn.config import BLOCK
from thrift_attn.reference.channel_scales import LARGEST, is_power_of_two
from thrift_attn.reference.pages import SequenceTensors


def state_dict(cache: PagedThriftCache) -> dict[str, Tensor]:
    """Return all that `load_state_dict` needs to fill another cache; a page that sequences share is there once.

    Returns:
        ``base``, ``k_block_mean``, ``high``: the planes ``[n, Hkv, ...]`` of the pages in use; ``blocks``: int64
        ``[B, max_blocks]``, which of them holds each complete block of each sequence, -1 behind the last; ``tokens``: int64
        ``[B]``; ``tail``: ``[2, B, 2, Hkv, 64, D]``, K and V of the two newest blocks, block b at b mod 2; ``tail_blocks``:
        int64 ``[B, 2]``, the number of the block that each of the two is; and what belongs to each sequence, by the names of
        `thrift_attn.reference.pages.SequenceTensors`. Where not all blocks keep the plane of promoted ones, ``high`` is that
        of the slots in use, and there are ``residual_slots``: int64 ``[B, W]``, which of them each sequence has, -1 behind
        the last; ``slot_of_page``: int64 ``[n, Hkv]``; and ``past_mass``: float32 ``[n, Hkv]``.
    """
    with cache._reading():
        cache._changes.check()
        tokens = [cache.tokens(seq) for seq in range(cache.batch)]
        pages, numbers = torch.cat([cache.table.pages(seq) for seq in range(cache.batch)]).unique(return_inverse=True)
        blocks = torch.full((cache.batch, max(tokens) // BLOCK), -1, dtype=torch.int64)
        for seq, found in enumerate(numbers.cpu().split([count // BLOCK for count in tokens])):
            blocks[seq, : len(found)] = found
        planes = {"base": cache.pool.base[pages], "k_block_mean": cache.pool.k_block_mean[pages]}
        planes |= _residents(cache, pages)
        found = {**planes, "blocks": blocks, "tokens": torch.tensor(tokens)}
        found["tail"] = _blocks_of(cache.tail).contiguous()
        found["tail_blocks"] = torch.tensor(cache._tail_blocks)
        return found | {name: x for name, x in cache.per_sequence._asdict().items() if x is not None}


def _blocks_of(tail: Tensor) -> Tensor:
    """The two blocks that each ring ``[B, 2, Hkv, 128, D]`` holds, as they are saved: a view ``[2, B, 2, Hkv, 64, D]``."""
    return tail.unflatten(3, (2, BLOCK)).permute(1, 0, 3, 2, 4, 5)


def _residents(cache: PagedThriftCache, pages: Tensor) -> dict[str, Tensor]:
    """Return the plane of promoted blocks of these pages, and where it lies."""
    slots = cache.residual_slots
    if slots is None:
        return {"high": cache.pool.high[pages]}
    held = [slots.slots_of(seq, cache.tokens(seq) // BLOCK) for seq in range(cache.batch)]
    used = sorted({slot for each in held for slot in each})
    number = {slot: at for at, slot in enumerate(used)}
    lists = torch.full((cache.batch, max(map(len, held))), -1, dtype=torch.int64)
    for seq, each in enumerate(held):
        lists[seq, : len(each)] = torch.tensor([number[slot] for slot in each], dtype=torch.int64)
    numbers = torch.full((len(slots.tensors.block_of_slot) + 1,), -1, dtype=torch.int64)
    numbers[torch.tensor(used, dtype=torch.int64)] = torch.arange(len(used))
    return {
        "high": cache.pool.high[torch.tensor(used, dtype=torch.int64, device=cache.device)],
        "residual_slots": lists,
        "slot_of_page": numbers.to(cache.device)[slots.of_pages(pages)],  # the last entry is for no slot
        "past_mass": slots.tensors.past_mass[pages],
    }


def load_state_dict(cache: PagedThriftCache, saved: dict[str, Tensor]) -> None:
    """Fill an empty cache with what `state_dict` gave.

    Raises:
        ValueError: a cache that is not empty, or of another batch, shape or plane of high precision; contents that do not fit
            each other. Nothing has changed then.
        TypeError: something else than tensors by name.
        RuntimeError: the pool is too small.
    """
    with cache._lock:
        cache._changes.check()
        _check_state_dict(cache, saved)
        with cache._changing():
            for seq in range(cache.batch):
                cache._empty(seq)  # pages reserved but not written
        if cache.residual_slots is not None:
            cache.residual_slots.check_slots(_lists(saved["residual_slots"]))
        with cache._changing():
            _load(cache, saved)


def _lists(numbers: Tensor) -> list[list[int]]:
    """Numbers of pages or slots of each sequence, of a tensor ``[B, W]`` that is filled up with -1."""
    return [[number for number in row if number >= 0] for row in numbers.tolist()]


def _load(cache: PagedThriftCache, saved: dict[str, Tensor]) -> None:
    """Write what was saved, and checked, into an empty cache."""
    tokens, held = saved["tokens"].tolist(), _lists(saved["blocks"])
    given = torch.tensor(cache.table.assign(held, tokens), dtype=torch.int64, device=cache.device)
    cache.pool.base[given] = saved["base"].to(cache.device)
    cache.pool.k_block_mean[given] = saved["k_block_mean"].to(cache.device)
    if cache.residual_slots is None:
        cache.pool.high[given] = saved["high"].to(cache.device)
    else:
        _load_residents(cache, saved, given, held)
    _blocks_of(cache.tail).copy_(saved["tail"])
    if "k_channel_scale" in saved and cache.per_sequence.k_channel_scale is None:
        cache.per_sequence = SequenceTensors.empty(
            cache.batch, cache.kv_heads, cache.head_dim, scaled=True, dtype=cache.dtype, device=cache.device
        )
    for name, x in cache.per_sequence._asdict().items():
        if x is not None:
            x.copy_(saved[name]) if name in saved else x.fill_(1)  # scales of pages that were written without
    cache._tail_blocks = saved["tail_blocks"].tolist()


def _load_residents(cache: PagedThriftCache, saved: dict[str, Tensor], pages: Tensor, blocks: list[list[int]]) -> None:
    """Write the plane of promoted blocks into slots of an empty cache, and which blocks of which pages they hold."""
    slots = cache.residual_slots
    assert slots is not None
    given = torch.tensor(slots.assign(_lists(saved["residual_slots"])), dtype=torch.int64, device=cache.device)
    cache.pool.high[given] = saved["high"].to(cache.device)
    number = saved["slot_of_page"].to(cache.device)
    slot = torch.nn.functional.pad(given, (0, 1), value=-1)[number]  # [n, Hkv]; no slot is the last entry
    slots.tensors.slot_of_page[pages] = slot.int()
    slots.tensors.past_mass[pages] = saved["past_mass"].to(cache.device)
    block = torch.zeros(len(pages), dtype=torch.int32, device=cache.device)
    for held in blocks:
        block[torch.tensor(held, dtype=torch.int64)] = torch.arange(len(held), dtype=torch.int32, device=cache.device)
    page, head = (slot >= 0).nonzero(as_tuple=True)
    slots.tensors.block_of_slot[slot[page, head], head] = block[page]
    cache._share_slots()


def _check_state_dict(cache: PagedThriftCache, saved: dict[str, Tensor]) -> None:
    """Raise ValueError unless what was saved fits an empty cache and itself."""
    if not isinstance(saved, Mapping) or not all(isinstance(x, Tensor) for x in saved.values()):
        raise TypeError("what was saved must be the tensors that state_dict gave, by name")
    if "tokens" in saved and saved["tokens"].numel() != cache.batch:
        raise ValueError(f"the saved batch has {saved['tokens'].numel()} sequences, the cache {cache.batch}")
    if any(cache.tokens(seq) for seq in range(cache.batch)):
        raise ValueError("a cache must be empty to be filled; free its sequences first")
    names = {*cache.pool._fields, "blocks", "tokens", "tail", "tail_blocks", "block0_mean", "sink_value"}
    if "k_channel_scale" in saved:
        names |= {"k_channel_scale", "v_head_scale"}
    if cache.residual_slots is not None:
        names |= {"residual_slots", "slot_of_page", "past_mass"}
    if ("residual_slots" in saved) != (cache.residual_slots is not None):
        kept = "some" if "residual_slots" in saved else "all"
        raise ValueError(
            f"the saved sequences keep the residuals of {kept} blocks, this cache has residual_share="
            f"{cache.config.residual_share:g}: make it with {'less than 1' if kept == 'some' else 'residual_share=1'}"
        )
    if saved.keys() != names:
        raise ValueError(f"expected the tensors {', '.join(sorted(names))}, got {', '.join(sorted(saved))}")
    batch, pages = cache.batch, saved["base"].shape[:1].numel()
    for name, plane in zip(cache.pool._fields, cache.pool, strict=True):
        count = saved["high"].shape[:1].numel() if name == "high" and cache.residual_slots is not None else pages
        if saved[name].shape != (count, *plane.shape[1:]) or saved[name].dtype != plane.dtype:
            got = f"{list(saved[name].shape[1:])} {saved[name].dtype}"
            raise ValueError(f"pages of {name} have shape {list(plane.shape[1:])} {plane.dtype}, the saved ones {got}")
    tokens = saved["tokens"].tolist()
    if min(tokens) < 0:
        raise ValueError(f"lengths must be at least 0, got {tokens}")
    cache.table.check_lengths(tokens)
    heads, dim = cache.kv_heads, cache.head_dim
    shapes = {
        "tokens": ((batch,), torch.int64),
        "blocks": ((batch, max(tokens) // BLOCK), torch.int64),
        "tail": (tuple(_blocks_of(cache.tail).shape), cache.dtype),
        "tail_blocks": ((batch, 2), torch.int64),
        "block0_mean": ((batch, heads, dim), cache.dtype),
        "sink_value": ((batch, heads, dim), cache.dtype),
        "k_channel_scale": ((batch, heads, dim), torch.float32),
        "v_head_scale": ((batch, heads), torch.float32),
        "residual_slots": ((batch, saved["residual_slots"].shape[-1] if "residual_slots" in saved else 0), torch.int64),
        "slot_of_page": ((pages, heads), torch.int64),
        "past_mass": ((pages, heads), torch.float32),
    }
    for name in names & shapes.keys():
        shape, dtype = shapes[name]
        if tuple(saved[name].shape) != shape or saved[name].dtype != dtype:
            got = f"{list(saved[name].shape)} {saved[name].dtype}"
            raise ValueError(f"{name} must have shape {list(shape)} and dtype {dtype}, got {got}")
    for name in ("k_channel_scale", "v_head_scale"):
        if name in names and not is_power_of_two(saved[name]).all():
            raise ValueError(f"{name} must hold powers of two from 2^-{LARGEST:g} to 2^{LARGEST:g}")
    for seq, (count, held, tail_blocks) in enumerate(
        zip(tokens, saved["blocks"].tolist(), saved["tail_blocks"].tolist(), strict=True)
    ):
        whole = count // BLOCK
        if not all(0 <= n < pages for n in held[:whole]) or any(n != -1 for n in held[whole:]):
            raise ValueError(f"sequence {seq} of {count} tokens needs {whole} of {pages} pages, got blocks {held}")
        fits = all(b == -1 or (b % 2 == at and 0 <= b * BLOCK < count) for at, b in enumerate(tail_blocks))
        if not fits or (count % BLOCK and tail_blocks[whole % 2] != whole):
            raise ValueError(f"sequence {seq} of {count} tokens cannot have the blocks {tail_blocks} in 16 bits")
    used = {page for held in _lists(saved["blocks"]) for page in held}
    if len(used) != pages:
        raise ValueError(f"of {pages} saved pages sequences have {len(used)}")
    if cache.residual_slots is not None:
        _check_residents(saved, cache.residual_slots.width)


def _check_residents(saved: dict[str, Tensor], width: int) -> None:
    """Raise ValueError unless every resident lies in a slot of all sequences that hold its page, and no two in one.

    Args:
        saved: what else was checked.
        width: most slots of a sequence.
    """
    count, numbers, mass = len(saved["high"]), saved["slot_of_page"].cpu(), saved["past_mass"]
    if bool(((numbers < -1) | (numbers >= count)).any()):
        raise ValueError(f"slot_of_page must hold numbers of the {count} saved slots or -1")
    if not bool(((mass >= 0) & mass.isfinite()).all()):
        raise ValueError("past_mass must hold finite numbers of at least 0")
    before: dict[int, int] = {}  # the slot before each: sequences share the first of their lists
    number_of: dict[int, int] = {}  # of the block in a page
    for seq, (held, blocks) in enumerate(zip(saved["residual_slots"].tolist(), _lists(saved["blocks"]), strict=True)):
        own = [number for number in held if number >= 0]
        if len(own) > width:
            raise ValueError(
                f"sequence {seq} was saved with {len(own)} slots of residuals, this cache has room for {width}: make it with a "
                f"larger residual_share or pool"
            )
        fits = held[: len(own)] == own and len(set(own)) == len(own) and all(number < count for number in own)
        if not fits or any(before.setdefault(slot, last) != last for last, slot in pairwise([-1, *own])):
            raise ValueError(f"sequence {seq} cannot have the slots {held} of {count}")
        if any(number_of.setdefault(page, number) != number for number, page in enumerate(blocks)):
            raise ValueError(
                f"sequence {seq} cannot have the blocks {blocks}: a page is the same block of all sequences"
            )
        for head, lie in enumerate(numbers[torch.tensor(blocks, dtype=torch.int64)].T.tolist()):
            if not {number for number in lie if number >= 0} <= set(own):
                raise ValueError(
                    f"head {head} of sequence {seq} cannot have residents in the slots {lie}, it has {own}"
                )
    if len(before) != count:
        raise ValueError(f"of {count} saved slots sequences have {len(before)}")
    for head, lie in enumerate(numbers.T.tolist()):
        used = [number for number in lie if number >= 0]
        if len(set(used)) != len(used):
            raise ValueError(f"head {head} cannot have two blocks in one of the slots {used}")
