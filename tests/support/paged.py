"""A small paged cache in plain PyTorch, the float64 answer of one decode step, and the kernels' answer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from support.device import DEVICE
from support.pages import reference_planes
from support.steps import cache_tensors, numerics_of, poisoned_step, residents_of
from thrift_attn.decode.ops import step_kernels
from thrift_attn.decode.tensors import ResidentTensors
from thrift_attn.reference.formats import RESIDUALS
from thrift_attn.reference.page_layout import decode_bytes, pack_copy, plane_size, unpack_plane

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass
class Cache:
    """Pages of ragged sequences; page numbers are shuffled and the pool has pages that nobody owns."""

    k: list[Tensor]  # per sequence [Hkv, T, D]
    v: list[Tensor]
    lengths: Tensor
    page_table: Tensor
    base: Tensor
    high: Tensor | None
    centres: Tensor
    tail: Tensor
    rings: Tensor
    plane: str | None
    residents: ResidentTensors | None = None


def decoded(plane: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """float64 K and V [..., 64, D] of a packed plane."""
    c = unpack_plane(plane.cpu(), dim, bits)
    if bits == 4:
        table = torch.cat([E2M1, -E2M1])
        k, v = table[c.k.int()], table[c.v.int()]
    else:
        k, v = c.k.view(torch.float8_e4m3fn).float(), c.v.view(torch.float8_e4m3fn).float()
    k = k * decode_bytes(c.k_scales).repeat_interleave(16, -1)
    v = v * decode_bytes(c.v_scales).repeat_interleave(16, -2)
    return k.double(), v.double()


def make_cache(
    lengths, kv_heads, dim, *, plane="nested", dtype=torch.float16, capacity=None, seed=0, ring=128
) -> Cache:
    g = torch.Generator().manual_seed(seed)
    capacity = capacity or max(-(-n // 64) for n in lengths)
    pool = sum(n // 64 for n in lengths) + 3
    order = torch.randperm(pool, generator=g).tolist()
    page_table = torch.full((len(lengths), capacity), 2**30, dtype=torch.int32)  # unused entries must not be read
    ks, vs = [], []
    base, centres, high = None, torch.randn(pool, kv_heads, dim, generator=g).to(dtype), None
    rings = torch.arange(len(lengths), 0, -1)
    tail = torch.full((len(lengths) + 1, 2, kv_heads, ring, dim), torch.nan, dtype=dtype)
    for i, n in enumerate(lengths):
        k = torch.randn(kv_heads, n, dim, generator=g) + 2 * torch.randn(kv_heads, 1, dim, generator=g)
        k += 0.7 * torch.randn(kv_heads, -(-n // 64), dim, generator=g).repeat_interleave(64, 1)[:, :n]
        k, v = k.to(dtype), torch.randn(kv_heads, n, dim, generator=g).to(dtype)
        ks.append(k)
        vs.append(v)
        full = n // 64
        blocks_k, blocks_v = (x[:, : full * 64].unflatten(1, (full, 64)).transpose(0, 1) for x in (k, v))
        newest = torch.arange(full * 64, n)
        tail[rings[i], :, :, newest % ring] = torch.stack([k, v])[:, :, newest]
        if not full:
            continue
        planes = reference_planes(blocks_k, blocks_v, "nvfp4", plane)
        pages = [order.pop() for _ in range(full)]
        page_table[i, :full] = torch.tensor(pages)
        high_planes = pack_copy(blocks_k, blocks_v) if plane == "16bit" else planes[1]
        if base is None:
            base = torch.full((pool, *planes[0].shape[1:]), 0x7FFFFFFF, dtype=torch.int32)
            if high_planes is not None:
                high = torch.full((pool, *high_planes.shape[1:]), 77, dtype=high_planes.dtype)
        base[pages], centres[pages] = planes[0], planes[2]
        if high is not None:
            high[pages] = high_planes
    if base is None:  # no complete block
        base = torch.zeros(pool, kv_heads, plane_size(dim, 4).words, dtype=torch.int32)
        if plane in RESIDUALS:
            high = torch.zeros(pool, kv_heads, plane_size(dim, RESIDUALS[plane].element_bits).words, dtype=torch.int32)
    dev = DEVICE
    return Cache(
        ks, vs, torch.tensor(lengths, dtype=torch.int32, device=dev), page_table.to(dev), base.to(dev),
        None if high is None else high.to(dev), centres.to(dev), tail.to(dev), rings.int().to(dev), plane,
    )  # fmt: skip


def keep_some(cache: Cache, share: float, seed: int = 0) -> Cache:
    """The same cache where each head has kept the plane of promoted blocks of a share of the pages, in slots of its own."""
    assert cache.high is not None
    pages, kv_heads = cache.base.shape[:2]
    gen = torch.Generator().manual_seed(seed)
    count = int(share * pages)
    slot_of_page = torch.full((pages, kv_heads), -1, dtype=torch.int32)
    high = cache.high.new_full((count + 1, *cache.high.shape[1:]), 77)  # one slot more, which nobody has
    for h in range(kv_heads):
        kept = torch.randperm(pages, generator=gen)[:count]
        slots = torch.randperm(count + 1, generator=gen)[:count]
        slot_of_page[kept, h] = slots.int()
        high[slots.to(high.device), h] = cache.high[kept.to(high.device), h]
    residents = residents_of(slot_of_page.to(high.device), len(cache.lengths), cache.page_table.shape[1])
    return dataclasses.replace(cache, high=high, residents=residents)


def run(cache: Cache, q, budget, *, splits=3, scale=None, window=None, softcap=None, first=1, last=1, centred=True):
    """The whole step through the launchers; every buffer is poisoned first."""
    center = "block" if centred else "none"
    numerics = numerics_of(cache.plane, center=center, sink_token="none", force_first=first, force_last=last)
    tensors = cache_tensors(
        cache.centres, cache.page_table, cache.lengths, budget=budget, base=cache.base, high=cache.high, tail=cache.tail,
        rings=cache.rings, residents=cache.residents,
    )  # fmt: skip
    scale = scale or q.shape[-1] ** -0.5
    step = poisoned_step(q, tensors, numerics, splits=splits, scale=scale, window=window, softcap=softcap)
    for launch in step_kernels(step).values():
        launch()
    return step.out, step.lse, step.block_indices, step.block_counts, step.bias, step.scores


def expected(cache: Cache, q, blocks, counts, *, scale=None, window=None, softcap=None):
    """float64 attention over what the pages decode to, with the blocks the kernel promoted."""
    batch, heads, tq, dim = q.shape
    kv_heads = cache.centres.shape[1]
    group = heads // kv_heads
    scale = scale or dim**-0.5
    outs, lses = torch.zeros(batch, heads, tq, dim).double(), torch.full((batch, heads, tq), -torch.inf).double()
    low_k, low_v = decoded(cache.base, dim, 4)
    low_k = low_k + cache.centres.cpu().double()[:, :, None]
    high_k = high_v = None
    if cache.plane in RESIDUALS:
        rk, rv = decoded(cache.high, dim, RESIDUALS[cache.plane].element_bits)
        if cache.residents is None:
            high_k, high_v = low_k + rk, low_v + rv
    for b in range(batch):
        n = int(cache.lengths[b])
        for h in range(kv_heads):
            k, v = cache.k[b][h].double().clone(), cache.v[b][h].double().clone()
            promoted = set(blocks[b, h, 0, : int(counts[b, h, 0])].tolist())
            for i in range(n // 64):
                page, at = int(cache.page_table[b, i]), slice(i * 64, i * 64 + 64)
                if i not in promoted:
                    k[at], v[at] = low_k[page, h], low_v[page, h]
                elif cache.residents is not None and cache.plane == "16bit":
                    assert cache.residents.slot_of_page[page, h] >= 0  # K and V as they came
                elif cache.residents is not None:
                    slot = int(cache.residents.slot_of_page[page, h])
                    assert slot >= 0
                    k[at], v[at] = low_k[page, h] + rk[slot, h], low_v[page, h] + rv[slot, h]
                elif high_k is not None:
                    k[at], v[at] = high_k[page, h], high_v[page, h]
            for g in range(group):
                s = q[b, h * group + g].cpu().double() @ k.T * scale
                if softcap:
                    s = softcap * torch.tanh(s / softcap)
                pos = torch.arange(n - tq, n)[:, None]
                tok = torch.arange(n)[None, :]
                hidden = tok > pos
                if window:
                    hidden |= tok <= pos - window
                s = s.masked_fill(hidden, -torch.inf)
                lses[b, h * group + g] = s.logsumexp(-1)
                p = s.softmax(-1).nan_to_num(0)
                outs[b, h * group + g] = p @ v
    return outs, lses
