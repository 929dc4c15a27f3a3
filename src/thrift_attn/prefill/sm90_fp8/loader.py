"""The warps that fetch data for `thrift_attn.prefill.sm90_fp8.kernel` and prepare what the other warps add to their
products."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma
from triton.language import PropagateNan

from thrift_attn.prefill.sm90_fp8.gluon_versions import thread_barrier, tma_load

HIDDEN = gl.constexpr(-1e30)  # q.c of a promoted block: no probability, yet finite, so that no difference is NaN
LOG2E = gl.constexpr(1.4426950408889634)
EIGHTHS = gl.constexpr(8 * 1.4426950408889634)  # logits of the low pass are in eighths of a power of two
_KEPT = gl.constexpr(PropagateNan.ALL)  # NaN
CHUNK = gl.constexpr(32)  # blocks whose means are multiplied at once
WIDTH = gl.constexpr(16)  # columns of one such product, few for the sake of registers
TILES = gl.constexpr(16)  # tiles of two blocks in a chunk
STAGES = gl.constexpr(4)


@gluon.jit
def uses(tiles, slot, step):
    """How often a slot was used before step ``step`` of the promoted blocks: by steps 0 to ``tiles``, and half of ``step``."""
    return (tiles - slot + STAGES) // STAGES + step // 2


@gluon.jit
def _promoted_bits(line, upto, first_block):
    """Blocks [first_block, first_block + 32) among the last 32 of the ``upto`` entries of a list, as bits; how many."""
    ENTRIES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = upto - 32 + gl.arange(0, 32, layout=ENTRIES)
    entry = gl.load(line + place, mask=place >= 0, other=-1)
    inside = entry >= first_block
    bits = gl.sum(gl.where(inside, 1 << (entry - first_block), 0), axis=0)
    return bits, gl.sum(inside.to(gl.int32), axis=0)


@gluon.jit
def _slope(x):
    """Factors of raw products [32] as [16, 2], each a number that half precision holds.

    The smallest is nothing beside a logit, but 0 * -inf of a hidden one would be NaN; a NaN stays.
    """
    x = gl.maximum(gl.minimum(x, 8e3, propagate_nan=_KEPT), 2e-7, propagate_nan=_KEPT)
    return x.to(gl.float16).to(gl.float32).reshape([16, 2])


@gluon.jit
def load_tiles(
    q_desc, k_desc, v_desc, q8_desc, k8_desc, v8_desc, c_desc, q_scale_ptr, k_scale_ptr, block_indices_ptr, block_counts_ptr,
    q8_smem, q_smem, k_smem, v_smem, k16_smem, v16_smem, c_smem, bias_smem, slope_smem,
    q_bar, c_bar, full, empty,
    batch, head, kv_head, kv_flat, q_flat, tile, first, tiles, offset, q_blocks, blocks, capacity, scale,
    D: gl.constexpr, PROMOTE: gl.constexpr, CENTRED: gl.constexpr,
):  # fmt: skip
    """Fetch Q, then the tiles of the low pass, last first, then the promoted blocks of both halves, in the order of use.

    A slot of the ring holds K of step i and V of step i - 1; its barrier expects both, one of them empty at the ends.
    """
    BIAS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    LIST: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    BYTES: gl.constexpr = D * 128
    last = first + tiles - 1
    mbarrier.expect(q_bar, 3 * BYTES)
    tma_load(q8_desc, [q_flat, tile * 128 - offset // 64 * 64, 0], q_bar, q8_smem)
    tma_load(q_desc, [batch, head, tile * 128 - offset, 0], q_bar, q_smem)
    top_chunk = last // TILES
    if CENTRED:
        mbarrier.expect(c_bar, CHUNK * D * 2)
        tma_load(c_desc, [kv_flat, top_chunk * CHUNK, 0], c_bar, c_smem)
    q_block = 2 * tile - offset // 64
    lines = block_indices_ptr + (q_flat.to(gl.int64) * q_blocks + q_block) * capacity
    scales = q_scale_ptr + q_flat.to(gl.int64) * q_blocks + q_block
    q_scale0 = gl.load(scales, mask=q_block >= 0, other=0.0)
    q_scale1 = gl.load(scales + 1, mask=q_block + 1 < q_blocks, other=0.0)
    left0 = 0
    left1 = 0
    if PROMOTE:
        counts = block_counts_ptr + q_flat.to(gl.int64) * q_blocks + q_block
        left0 = gl.load(counts, mask=q_block >= 0, other=0)
        left1 = gl.load(counts + 1, mask=q_block + 1 < q_blocks, other=0)
    count0 = left0
    count1 = left1
    mbarrier.wait(q_bar, 0)
    step = 0
    for turn in range(0, top_chunk - first // TILES + 1):
        chunk = top_chunk - turn
        side = chunk & 1
        block = chunk * CHUNK + gl.arange(0, 32, layout=LIST)
        k_scale = gl.load(k_scale_ptr + kv_flat.to(gl.int64) * blocks + block, mask=block < blocks, other=0.0)
        k_scale *= scale * EIGHTHS
        slope_smem.index(side * 2).store(_slope(k_scale * q_scale0))
        slope_smem.index(side * 2 + 1).store(_slope(k_scale * q_scale1))
        if CENTRED:
            mbarrier.wait(c_bar, turn & 1)
        for half in gl.static_range(2):
            bits = 0
            if PROMOTE:
                if half == 0:
                    bits, listed = _promoted_bits(lines, left0, chunk * CHUNK)
                    left0 -= listed
                else:
                    bits, listed = _promoted_bits(lines + capacity, left1, chunk * CHUNK)
                    left1 -= listed
            for part in gl.static_range(CHUNK // WIDTH):
                bias = gl.full([64, WIDTH], 0.0, gl.float32, layout=BIAS)
                if CENTRED:
                    q16 = q_smem.reshape([128, D]).slice(half * 64, 64, 0)
                    c16 = c_smem.reshape([CHUNK, D]).slice(part * WIDTH, WIDTH, 0)
                    bias = warpgroup_mma(q16, c16.permute((1, 0)), bias, use_acc=False) * (scale * EIGHTHS)
                if PROMOTE:
                    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, BIAS))[None, :]
                    bias = gl.where(((bits >> (cols + part * WIDTH)) & 1) != 0, HIDDEN, bias)
                place = bias_smem.index(side * 2 + half).slice(part * WIDTH // 2, WIDTH // 2, 0)
                place.store(bias.reshape([64, WIDTH // 2, 2]).permute((1, 0, 2)))
        thread_barrier()
        if CENTRED and chunk > first // TILES:
            mbarrier.expect(c_bar, CHUNK * D * 2)
            tma_load(c_desc, [kv_flat, (chunk - 1) * CHUNK, 0], c_bar, c_smem)
        top = gl.minimum(last, chunk * TILES + TILES - 1)
        bottom = gl.maximum(first, chunk * TILES)
        for back in range(0, top - bottom + 1):
            now = top - back
            at = step % STAGES
            mbarrier.wait(empty.index(at), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(at), BYTES)
            tma_load(k8_desc, [kv_flat, now * 128, 0], full.index(at), k_smem.index(at))
            if step == 0:
                mbarrier.expect(full.index(at), 0)
            else:
                mbarrier.expect(full.index(at), BYTES)
                tma_load(v8_desc, [kv_flat, 0, now * 128 + 128], full.index(at), v_smem.index(at))
            step += 1
    at = tiles % STAGES
    mbarrier.wait(empty.index(at), (tiles // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(at), BYTES)
    mbarrier.expect(full.index(at), 0)
    tma_load(v8_desc, [kv_flat, 0, first * 128], full.index(at), v_smem.index(at))
    if PROMOTE:
        for i in range(0, gl.maximum(count0, count1) + 1):
            for half in gl.static_range(2):
                count = count0 if half == 0 else count1
                if (count > 0) & (i <= count):
                    line = lines + half * capacity
                    at = half * 2 + i % 2
                    mbarrier.wait(empty.index(at), (uses(tiles, at, i) & 1) ^ 1)
                    if i < count:
                        mbarrier.expect(full.index(at), BYTES)
                        k_place = [batch, kv_head, gl.load(line + i) * 64, 0]
                        tma_load(k_desc, k_place, full.index(at), k16_smem.index(at))
                    else:
                        mbarrier.expect(full.index(at), 0)
                    if i > 0:
                        mbarrier.expect(full.index(at), BYTES)
                        v_place = [batch, kv_head, gl.load(line + i - 1) * 64, 0]
                        tma_load(v_desc, v_place, full.index(at), v16_smem.index(at))
                    else:
                        mbarrier.expect(full.index(at), 0)
