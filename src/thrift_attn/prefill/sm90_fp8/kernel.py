"""FP8 prefill attention for sm_90: both products on FP8 wgmma, promoted blocks in 16 bits, one online softmax.

One program per tile of 128 query rows and a head, three groups of warps:

- the *loader* (4 warps, `loader`) fetches tiles with TMA; every 32 blocks it also multiplies Q with their centres
  (16-bit wgmma), hides the promoted blocks of each query block and leaves one number per row and block in shared memory;
- two *consumers* (4 warps each) own 64 rows, which is one query block with one list: a loop over tiles of 128 tokens in FP8
  (`fp8_softmax` says how a tile becomes P), then a loop over the promoted blocks of their list in 16 bits.

Row sums are a product of P with ones, so that weights sum to one whatever P was rounded to. FP8 products of one tile with V
have an accumulator of their own, added in float32, since the hardware keeps about 14 bits inside a chain of FP8 products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from thrift_attn.prefill.sm90_fp8.fp8_softmax import (
    as_operand,
    as_words,
    code_probabilities,
    in_flight,
    load_terms,
    over_rows,
    softcapped,
    update_maximum,
    visible_columns,
)
from thrift_attn.prefill.sm90_fp8.gluon_versions import reinterpret, thread_barrier, tma_store
from thrift_attn.prefill.sm90_fp8.loader import CHUNK, LOG2E, STAGES, TILES, load_tiles, uses

FLOOR = gl.constexpr(-1e20)  # where the running maximum starts: above HIDDEN, below any logit


@gluon.jit
def _scores(q8, k, LAYOUT: gl.constexpr):
    """Q K of a tile in half precision, started: as `as_words`, to be waited for."""
    zero = gl.full([64, 128], 0.0, gl.float16, layout=LAYOUT)
    token = warpgroup_mma(q8, k.reshape([128, q8.shape[1]]).permute((1, 0)), zero, use_acc=False, is_async=True)
    return as_words(in_flight(token))


@gluon.jit
def _weighted(p, v, ones, D: gl.constexpr, OUT: gl.constexpr):
    """P' V of a tile and the row sums of P', started; in accumulators of their own."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    zero = gl.full([64, D], 0.0, gl.float32, layout=OUT)
    none = gl.full([64, 8], 0.0, gl.float32, layout=SUMS)
    o = warpgroup_mma(p, v.reshape([D, 128]).permute((1, 0)), zero, use_acc=False, is_async=True)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, SUMS, 4), assert_trivial=True)
    return o, warpgroup_mma(p, ones.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _row_sums(sums):
    """Row sums [64, 4], the same in each lane, from the product with ones [64, 8]."""
    first, _second = sums.reshape([64, 4, 2]).split()
    return first


@gluon.jit
def _turn(TEXT: gl.constexpr):
    """One instruction for every thread of a consumer."""
    THREADS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    thread = gl.arange(0, 128, layout=THREADS)
    gl.inline_asm_elementwise(TEXT, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _await_turn(HALF: gl.constexpr):
    if HALF == 0:
        _turn("bar.sync 10, 256; mov.b32 $0, $1;")
    else:
        _turn("bar.sync 11, 256; mov.b32 $0, $1;")


@gluon.jit
def _pass_turn(HALF: gl.constexpr):
    """The other consumer may start its products."""
    if HALF == 0:
        _turn("bar.arrive 11, 256; mov.b32 $0, $1;")
    else:
        _turn("bar.arrive 10, 256; mov.b32 $0, $1;")


@gluon.jit
def _low_pass(
    HALF: gl.constexpr, q8, k_smem, v_smem, ones, bias_smem, slope_smem, full, empty,
    row, first, tiles, key_end, cap, window,
    D: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr, SINK: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """All tiles in FP8, the last one first; P of the first token is left out if SINK.

    Step i multiplies Q with K of tile i and P with V of tile i - 1, which lie in the same slot of the ring, waits for both and
    works out P of tile i. What hides the wait is the other consumer: the two take turns in starting products, so that one
    calculates while the tensor cores work for the other. Without turns both wait and both calculate at the same time.

    Returns:
        Two parts of the output ``[64, D]`` and the factor of the first; maximum in units of log2, and row sums ``[64]``.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    last = first + tiles - 1
    limits = visible_columns(row, last, key_end, window, CAUSAL, WINDOW)
    mbarrier.wait(full.index(0), 0)
    s_first = warpgroup_mma_wait(0, deps=[_scores(q8, k_smem.index(0), SCORES)])
    mbarrier.arrive(empty.index(0), count=1)
    PAIR: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, s_first.type.layout))
    terms = load_terms(bias_smem, slope_smem, last, HALF, PAIR)
    m = gl.full([64], FLOOR, gl.float32, layout=ROWS)
    x, m = update_maximum(s_first, m, terms, cap, limits, True, CAP, PAIR)
    words = code_probabilities(x, m, terms, CAP, PAIR)
    alpha = gl.full([64], 1.0, gl.float32, layout=ROWS)
    o = gl.full([64, D], 0.0, gl.float32, layout=OUT)
    none = gl.full([64, 8], 0.0, gl.float32, layout=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32]))
    row_sum = _row_sums(none)
    LANES: gl.constexpr = gl.SliceLayout(1, row_sum.type.layout)
    if (HALF == 1) & (tiles > 1):
        _pass_turn(HALF)
    for step in range(1, tiles):
        at = step % STAGES
        now = last - step
        mbarrier.wait(full.index(at), (step // STAGES) & 1)
        _await_turn(HALF)
        s_token = _scores(q8, k_smem.index(at), SCORES)
        o_token, n_token = _weighted(as_operand(words, OUT), v_smem.index(at), ones, D, OUT)
        if (HALF == 0) | (step + 1 < tiles):
            _pass_turn(HALF)
        terms = load_terms(bias_smem, slope_smem, now, HALF, PAIR)
        edge = limits
        if WINDOW:
            edge = visible_columns(row, now, key_end, window, CAUSAL, WINDOW)
        s, o_part, sums = warpgroup_mma_wait(0, deps=[s_token, o_token, n_token])
        mbarrier.arrive(empty.index(at), count=1)
        o = gl.fma(o, over_rows(alpha, OUT).broadcast_to([64, D]), o_part)
        row_sum = row_sum * gl.expand_dims(gl.convert_layout(alpha, LANES), 1) + _row_sums(sums)
        x, m_new = update_maximum(s, m, terms, cap, edge, WINDOW, CAP, PAIR)
        words = code_probabilities(x, m_new, terms, CAP, PAIR)
        alpha = gl.exp2(0.125 * (m - m_new))
        m = m_new
    if SINK:
        W: gl.constexpr = words.type.layout
        chunk = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, W)))
        lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, W)))
        place = gl.expand_dims(gl.expand_dims(chunk, 0), 2) * 4 + gl.expand_dims(gl.expand_dims(lane, 0), 1)
        words = gl.where(place + first == 0, words & -0x100, words)
    end = tiles % STAGES
    mbarrier.wait(full.index(end), (tiles // STAGES) & 1)
    o_token, n_token = _weighted(as_operand(words, OUT), v_smem.index(end), ones, D, OUT)
    o_end, sums = warpgroup_mma_wait(0, deps=[o_token, n_token])
    mbarrier.arrive(empty.index(end), count=1)
    row_sum = row_sum * gl.expand_dims(gl.convert_layout(alpha, LANES), 1) + _row_sums(sums)
    return o, o_end, alpha, 0.125 * m, gl.convert_layout(gl.max(row_sum, axis=1), ROWS) * (1 / 384)


@gluon.jit
def _high_softmax(
    s, m, block, row, first_row, key_end, scale, cap, window,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """Probabilities float32 ``[64, 64]`` of a promoted block, the new maximum and the factor of what was before it."""
    SCORES: gl.constexpr = s.type.layout
    factor = scale * LOG2E
    if CAP:
        s = softcapped(s, factor * 2 * LOG2E / cap, cap)
        factor = 1.0
    start = block * 64
    edge = start + 64 > key_end
    if CAUSAL:
        edge = edge | (start + 63 > first_row)
    if WINDOW:
        edge = edge | (start <= first_row + 63 - window)
    if edge:
        cols = start + gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES))[None, :]
        where = over_rows(row, SCORES)
        seen = (cols < key_end).broadcast_to([64, 64])
        if CAUSAL:
            seen = seen & (cols <= where)
        if WINDOW:
            seen = seen & (cols > where - window)
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.convert_layout(gl.max(s, axis=1) * factor, m.type.layout))
    slope = gl.full([64, 64], 1.0, gl.float32, layout=SCORES) * factor
    p = gl.exp2(gl.fma(s, slope, -over_rows(m_new, SCORES).broadcast_to([64, 64])))
    return p, m_new, gl.exp2(m - m_new)


@gluon.jit
def _high_pass(
    HALF: gl.constexpr, o, m, total, q16, k16_smem, v16_smem, full, empty,
    line, count, common, row, first_row, tiles, key_end, scale, cap, window,
    D: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr,
):  # fmt: skip
    """The promoted blocks of this half's list in 16 bits, at least one; turns for as long as both lists (``common``) last.

    Each half has two slots of the ring to itself; step i multiplies Q with K of block i and P with V of block i - 1.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OUT16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT16, 2)
    LAYOUT: gl.constexpr = o.type.layout
    o = gl.convert_layout(o, OUT16)
    block = gl.load(line)
    here = HALF * 2
    mbarrier.wait(full.index(here), uses(tiles, here, 0) & 1)
    zero = gl.full([64, 64], 0.0, gl.float32, layout=SCORES)
    s_first = warpgroup_mma(q16, k16_smem.index(here).reshape([64, D]).permute((1, 0)), zero, use_acc=False)
    mbarrier.arrive(empty.index(here), count=2)
    p, m, alpha = _high_softmax(s_first, m, block, row, first_row, key_end, scale, cap, window, CAUSAL, WINDOW, CAP)
    total = total * alpha + gl.convert_layout(gl.sum(p, axis=1), m.type.layout)
    o = o * over_rows(alpha, OUT16)
    upcoming = gl.load(line + 1, mask=count > 1, other=0)
    if (HALF == 1) & (common > 1):
        _pass_turn(HALF)
    for i in range(1, count):
        block = upcoming
        upcoming = gl.load(line + i + 1, mask=i + 1 < count, other=0)
        at = HALF * 2 + i % 2
        mbarrier.wait(full.index(at), uses(tiles, at, i) & 1)
        if i < common:
            _await_turn(HALF)
        s_token = warpgroup_mma(
            q16, k16_smem.index(at).reshape([64, D]).permute((1, 0)), gl.full([64, 64], 0.0, gl.float32, layout=SCORES),
            use_acc=False, is_async=True,
        )  # fmt: skip
        p16 = gl.convert_layout(p.to(q16.dtype), LEFT)
        o_token = warpgroup_mma(p16, v16_smem.index(at).reshape([64, D]), o, is_async=True)
        if i + HALF < common:
            _pass_turn(HALF)
        s = warpgroup_mma_wait(1, deps=[s_token])
        o = warpgroup_mma_wait(0, deps=[o_token])
        mbarrier.arrive(empty.index(at), count=2)
        p, m, alpha = _high_softmax(s, m, block, row, first_row, key_end, scale, cap, window, CAUSAL, WINDOW, CAP)
        total = total * alpha + gl.convert_layout(gl.sum(p, axis=1), m.type.layout)
        o = o * over_rows(alpha, OUT16)
    end = HALF * 2 + count % 2
    mbarrier.wait(full.index(end), uses(tiles, end, count) & 1)
    p_end = gl.convert_layout(p.to(q16.dtype), LEFT)
    o = warpgroup_mma(p_end, v16_smem.index(end).reshape([64, D]), o)
    mbarrier.arrive(empty.index(end), count=2)
    return gl.convert_layout(o, LAYOUT), m, total


@gluon.jit
def _sink(
    o, m, total, row, at, inside, sink_logits_ptr, sink_value_ptr, listed, scale, cap, window,
    D: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """The first token, exact, where its block is not on the list and the row sees it: output and row sums with it.

    Args:
        at: where the rows' exact logits of the first token lie ``[64]``, unscaled; read if ``inside``.
        sink_value_ptr: V of that token.
        listed: whether its block is promoted.
    """
    s = gl.load(sink_logits_ptr + at, mask=inside, other=0.0) * (scale * LOG2E)
    if CAP:
        s = softcapped(s, 2 * LOG2E / cap, cap)
    seen = (row >= 0) & (listed == 0)
    if WINDOW:
        seen = seen & (row < window)
    p = gl.where(seen, gl.exp2(s - m), 0.0)
    value = gl.load(sink_value_ptr + gl.arange(0, D, layout=gl.SliceLayout(0, OUT))).to(gl.float32)
    return o + over_rows(p, OUT) * gl.expand_dims(value, 0), total + p


@gluon.jit
def _consumer(
    HALF: gl.constexpr, q8_smem, q_smem, k_smem, v_smem, ones, k16_smem, v16_smem, bias_smem, slope_smem,
    q_bar, full, empty, out_desc, out_ptr, out_strides, v_scale_ptr, sink_logits_ptr, sink_value_ptr,
    block_indices_ptr, block_counts_ptr, lse_ptr, batch, head, kv_flat, q_flat, tile, first, tiles,
    queries, key_end, offset, q_blocks, blocks, capacity, scale, cap, window,
    D: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr, PROMOTE: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    """One query block of a tile."""
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32])
    ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    q_block = 2 * tile + HALF - offset // 64
    inside = (q_block >= 0) & (q_block < q_blocks)
    row = tile * 128 + HALF * 64 + gl.arange(0, 64, layout=ROWS)  # positions
    mbarrier.wait(q_bar, 0)
    o, o_end, alpha, m, total = _low_pass(
        HALF, q8_smem.slice(HALF * 64, 64, 0), k_smem, v_smem, ones, bias_smem, slope_smem,
        full, empty, row, first, tiles, key_end, cap, window,
        D, CAUSAL, WINDOW, CAP, SINK, OUT,
    )  # fmt: skip
    unit = gl.load(v_scale_ptr + kv_flat.to(gl.int64) * blocks) / 384.0
    o = o * over_rows(alpha * unit, OUT) + o_end * unit
    q16 = q_smem.reshape([128, D]).slice(HALF * 64, 64, 0)
    count = 0
    common = 0
    line = block_indices_ptr + (q_flat.to(gl.int64) * q_blocks + q_block) * capacity
    if PROMOTE:
        counts = block_counts_ptr + q_flat.to(gl.int64) * q_blocks
        count = gl.load(counts + q_block, mask=inside, other=0)
        beside = q_block + 1 - 2 * HALF
        common = gl.minimum(count, gl.load(counts + beside, mask=(beside >= 0) & (beside < q_blocks), other=0))
    if SINK:
        listed = 0
        if PROMOTE:
            listed = (gl.load(line, mask=count > 0, other=1) == 0).to(gl.int32)  # lists ascend
        at = (q_flat.to(gl.int64) * q_blocks + q_block) * 64 + gl.arange(0, 64, layout=ROWS)
        o, total = _sink(
            o,
            m,
            total,
            row,
            at,
            inside,
            sink_logits_ptr,
            sink_value_ptr,
            listed,
            scale,
            cap,
            window,
            D,
            WINDOW,
            CAP,
            OUT,
        )
    if count > 0:
        o, m, total = _high_pass(
            HALF, o, m, total, q16, k16_smem, v16_smem, full, empty,
            line, count, common, row, tile * 128 + HALF * 64, tiles, key_end, scale, cap, window, D, CAUSAL, WINDOW, CAP,
        )  # fmt: skip
    o = o / over_rows(gl.where(total > 0.0, total, 1.0), OUT)
    start = tile * 128 + HALF * 64 - offset
    if start >= 0:
        q16.store(o.to(q16.dtype))  # nobody reads Q any more
        fence_async_shared()
        thread_barrier()
        tma_store(out_desc, [batch, head, start, 0], q_smem.slice(HALF * 64, 64, 2))
    elif start > -64:  # a TMA store may reach past the end, but not before the start
        cols = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))[None, :]
        query = (row - offset)[:, None]
        place = out_ptr + (batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[1])
        gl.store(place + (query * out_strides[2] + cols), o.to(q16.dtype), mask=query.broadcast_to([64, D]) >= 0)
    lse = gl.where(total > 0.0, (m + gl.log2(total)) / LOG2E, float("-inf"))
    at = row - offset
    gl.store(lse_ptr + q_flat.to(gl.int64) * queries + at, lse, mask=(at >= 0) & (at < queries))
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "stride_b", "stride_h", "stride_t", "stride_vb", "stride_vh", "window", "queries", "keys", "offset", "q_blocks",
        "blocks", "capacity", "q_tiles", "kv_heads", "section",
    ]
)  # fmt: skip
def attend_fp8_kernel(
    q_desc, k_desc, v_desc, q8_desc, k8_desc, v8_desc, c_desc, out_desc,
    out_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, sink_logits_ptr, v_ptr, block_indices_ptr, block_counts_ptr, lse_ptr,
    stride_b, stride_h, stride_t, stride_vb, stride_vh, scale, cap, window,
    queries, keys, offset, q_blocks, blocks, capacity, q_tiles, kv_heads, section,
    GROUP: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAP: gl.constexpr,
    PROMOTE: gl.constexpr, CENTRED: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    """See the module. Longest tiles first inside a section of KV heads whose data fit the L2 cache."""
    pid = gl.program_id(0)
    width = section * GROUP
    q_flat = pid // (q_tiles * width) * width + pid % width
    tile = offset // 128 + q_tiles - 1 - pid % (q_tiles * width) // width
    kv_flat = q_flat // GROUP
    batch = kv_flat // kv_heads
    kv_head = kv_flat % kv_heads
    head = q_flat - batch * kv_heads * GROUP
    last = (keys - 1) // 128
    if CAUSAL:
        last = gl.minimum(last, tile)
    first = 0
    if WINDOW:
        first = gl.maximum(tile * 128 + 1 - window, 0) // 128
    tiles = last - first + 1
    out_strides = (stride_b, stride_h, stride_t)
    sink_value_ptr = v_ptr + batch.to(gl.int64) * stride_vb + kv_head.to(gl.int64) * stride_vh  # V of the first token

    HALF16: gl.constexpr = q_desc.dtype
    q8_smem = gl.allocate_shared_memory(gl.float8e4nv, [1, 128, D], q8_desc.layout)
    q_smem = gl.allocate_shared_memory(HALF16, [1, 1, 128, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, 128, D], k8_desc.layout)
    v_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 1, D, 128], v8_desc.layout)
    k16_smem = reinterpret(k_smem, HALF16, [STAGES, 1, 1, 64, D], k_desc.layout)
    v16_smem = reinterpret(v_smem, HALF16, [STAGES, 1, 1, 64, D], v_desc.layout)
    c_smem = gl.allocate_shared_memory(HALF16, [1, CHUNK, D], c_desc.layout)
    FLAT3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    FLAT2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    FLAT1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bias_smem = gl.allocate_shared_memory(gl.float32, [4, TILES, 64, 2], FLAT3)
    slope_smem = gl.allocate_shared_memory(gl.float32, [4, TILES, 2], FLAT2)
    bias_rows = reinterpret(bias_smem, gl.float32, [4 * TILES, 64, 2], FLAT2)
    slope_rows = reinterpret(slope_smem, gl.float32, [4 * TILES, 2], FLAT1)

    ones = gl.allocate_shared_memory(gl.float8e4nv, [8, 128], gl.NVMMASharedLayout(128, 8, 2))
    ONES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    ones.store(gl.full([8, 128], 0x38, gl.int8, layout=ONES).to(gl.float8e4nv, bitcast=True))  # 0x38 is 1

    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_bar = gl.allocate_shared_memory(gl.int64, [1], BAR)
    c_bar = gl.allocate_shared_memory(gl.int64, [1], BAR)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    mbarrier.init(q_bar, count=1)
    mbarrier.init(c_bar, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_consumer, (
                0, q8_smem.reshape([128, D]), q_smem, k_smem, v_smem, ones, k16_smem, v16_smem, bias_rows, slope_rows,
                q_bar, full, empty, out_desc, out_ptr, out_strides, v_scale_ptr, sink_logits_ptr, sink_value_ptr,
                block_indices_ptr, block_counts_ptr, lse_ptr, batch, head, kv_flat, q_flat, tile, first, tiles, queries, keys,
                offset, q_blocks, blocks, capacity, scale, cap, window, D, CAUSAL, WINDOW, CAP, PROMOTE, SINK,
            )),
            (_consumer, (
                1, q8_smem.reshape([128, D]), q_smem, k_smem, v_smem, ones, k16_smem, v16_smem, bias_rows, slope_rows,
                q_bar, full, empty, out_desc, out_ptr, out_strides, v_scale_ptr, sink_logits_ptr, sink_value_ptr,
                block_indices_ptr, block_counts_ptr, lse_ptr, batch, head, kv_flat, q_flat, tile, first, tiles, queries, keys,
                offset, q_blocks, blocks, capacity, scale, cap, window, D, CAUSAL, WINDOW, CAP, PROMOTE, SINK,
            )),
            (load_tiles, (
                q_desc, k_desc, v_desc, q8_desc, k8_desc, v8_desc, c_desc, q_scale_ptr, k_scale_ptr, block_indices_ptr,
                block_counts_ptr, q8_smem, q_smem, k_smem, v_smem, k16_smem, v16_smem, c_smem, bias_smem, slope_smem,
                q_bar, c_bar, full, empty,
                batch, head, kv_head, kv_flat, q_flat, tile, first, tiles, offset, q_blocks, blocks, capacity, scale,
                D, PROMOTE, CENTRED,
            )),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip
