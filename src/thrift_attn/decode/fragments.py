"""Device functions on the tiles of a page (`thrift_attn.reference.page_layout`): load, widen, hand on as a matrix operand.

Everything here is arranged so that no data moves between lanes: tiles are loaded in the order of the matrix operand
registers, and every reshape and permute below only renames registers. `PORTABLE` selects plain operations instead of
inline assembly, for the interpreter; both compute the same bits.

The T tiles of a head are handled in chunks of C, a power of two, first the largest ones (80 dimensions: 4 tiles, then 1):
tensors have power-of-two sides, and few large operations keep the compiler's time down, which grows with the square of
their number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from thrift_attn.reference import page_layout

MASK = tl.constexpr(page_layout.MASK)

# One 32-bit register holds two words w of neighbouring columns; $5 and $7 hold the scales of quarters (0, 2) and (1, 3) of
# the row as half floats (operands come in pairs because two 16-bit elements are packed; both are equal). The four products
# are exact in half precision.
_WIDEN_ASM = tl.constexpr(
    """
{
.reg .b32 a, b, c, d, e, f;
.reg .b16 s0, s1, s2, s3;
.reg .b32 q0, q1, q2, q3;
mov.b32 {s0, s2}, $5;
mov.b32 {s1, s3}, $7;
mov.b32 q0, {s0, s0};
mov.b32 q1, {s1, s1};
mov.b32 q2, {s2, s2};
mov.b32 q3, {s3, s3};
and.b32 a, $4, MASK_OF_TWO;
shl.b32 b, $4, 3;
and.b32 b, b, MASK_OF_TWO;
shl.b32 c, $4, 6;
shl.b32 d, $4, 1;
lop3.b32 c, c, d, MASK_OF_TWO, 0x28;
shl.b32 e, $4, 9;
shl.b32 f, $4, 2;
lop3.b32 e, e, f, MASK_OF_TWO, 0x28;
mul.rn.f16x2 $0, a, q0;
mul.rn.f16x2 $1, b, q1;
mul.rn.f16x2 $2, c, q2;
mul.rn.f16x2 $3, e, q3;
}""".replace("MASK_OF_TWO", f"0x{page_layout.MASK << 16 | page_layout.MASK:08X}")
)

# The same for two e4m3 bytes per 16-bit word: sign to bit 15, the rest to bits 13:7 gives the value times 2^-8. $3 is the
# pair of scales for the low and the high byte.
_WIDEN8_ASM = tl.constexpr("""
{
.reg .b32 a, b, c, d;
.reg .b16 s0, s1;
.reg .b32 q0, q1;
mov.b32 {s0, s1}, $3;
mov.b32 q0, {s0, s0};
mov.b32 q1, {s1, s1};
shl.b32 a, $2, 8;
shl.b32 b, $2, 7;
and.b32 b, b, 0x3F803F80;
lop3.b32 a, a, b, 0x80008000, 0xEC;
shr.b32 c, $2, 1;
and.b32 c, c, 0x3F803F80;
lop3.b32 d, $2, c, 0x80008000, 0xEC;
mul.rn.f16x2 $0, a, q0;
mul.rn.f16x2 $1, d, q1;
}""")

_MOVMATRIX_ASM = tl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")


@triton.jit
def page_at(page, h, HKV: tl.constexpr, PAGE: tl.constexpr, HEAD: tl.constexpr):
    """Offset of head ``h`` of a page, or of a slot; PAGE and HEAD are the strides. One product where pages are contiguous."""
    if PAGE == HKV * HEAD:
        at = (page * HKV + h).to(tl.int64) * HEAD
    else:
        at = page.to(tl.int64) * PAGE + h.to(tl.int64) * HEAD
    return at


@triton.jit
def place_in_ring(start, token, RING: tl.constexpr):
    """Places in a ring of RING tokens of tokens of a block, less than 64, whose first lies at ``start``."""
    place = start + token
    if RING % 64 != 0:  # else no block wraps
        place = tl.where(place >= RING, place - RING, place)
    return place


@triton.jit
def load_codes(ptr, C: tl.constexpr, CACHE: tl.constexpr):
    """``C`` runs of 128 words, int32 [C * 128], one 16-byte load per lane and run."""
    return tl.load(ptr + tl.arange(0, C * 128), cache_modifier=CACHE)


@triton.jit
def load_scales(ptr, C: tl.constexpr, CACHE: tl.constexpr):
    """Scale words of ``C`` tiles, the same for the four lanes of a row: int32 [C, 8, 4, 2] (tile a q h)."""
    PAIRS: tl.constexpr = (C + 1) // 2
    index = tl.arange(0, 128)
    offset = (index // 16) * 4 + index % 4  # lane 4a + q reads the words (a h t)
    x = tl.load(ptr + tl.arange(0, PAIRS)[:, None] * 32 + offset[None, :], cache_modifier=CACHE)
    x = tl.reshape(x, [PAIRS, 8, 4, 2, 2])
    if C == 1:
        even, _odd = tl.split(x)
        x = even
    else:
        x = tl.reshape(tl.permute(x, [0, 4, 1, 2, 3]), [C, 8, 4, 2])
    return x


@triton.jit
def _half(bits):
    return (bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _over_columns(x):
    """[C, 8, 4, 2] to [C, 8, 4, 2, 2, 2]: one number per row for the four columns of a lane."""
    x = tl.join(x, x)
    return tl.join(x, x)


@triton.jit
def _words(w, C: tl.constexpr):
    """int32 [C * 128] to 16-bit words [C, 8, 4, 2, 2, 2] (tile a q h c1 c0)."""
    w = tl.reshape(w, [C, 8, 4, 2, 2])
    return tl.join(w.to(tl.int16), (w >> 16).to(tl.int16))


@triton.jit
def k_operand(x, C: tl.constexpr):
    """Widened K tiles [C, 8, 4, 2, 2, 2] (tile a q h c1 c0) to the operand [16 tokens, 16 * C dimensions]."""
    return tl.reshape(tl.permute(x, [3, 1, 0, 2, 4, 5]), [16, 16 * C])


@triton.jit
def v_operand(x, C: tl.constexpr):
    """Widened V tiles to the operand [16 * C dimensions, 16 tokens], tokens in the order of `next_operand`."""
    return tl.reshape(tl.permute(x, [0, 3, 1, 2, 4, 5]), [16 * C, 16])


@triton.jit
def quarter_bits(word, J: tl.constexpr):
    """Half-float bits of the e2m1 value times 2^-14 of token quarter J, see `thrift_attn.reference.page_layout`."""
    if J == 0:
        bits = word
    elif J == 1:
        bits = word << 3
    elif J == 2:
        bits = (word << 6) ^ (word << 1)
    else:
        bits = (word << 9) ^ (word << 2)
    return bits & MASK


@triton.jit
def widen4(words, scales, C: tl.constexpr, PORTABLE: tl.constexpr):
    """Four fp16 tensors [C, 8, 4, 2, 2, 2] of value * 2^-7, one per token quarter, from e2m1 words and their scales."""
    w = _words(words, C)
    s02 = _over_columns((scales << 7) & 0x7F807F80)  # half floats of quarters 0 and 2
    s13 = _over_columns((scales >> 1) & 0x7F807F80)
    if PORTABLE:
        x = w.to(tl.int32)
        a = _half(quarter_bits(x, 0)) * _half(s02)
        b = _half(quarter_bits(x, 1)) * _half(s13)
        c = _half(quarter_bits(x, 2)) * _half(s02 >> 16)
        d = _half(quarter_bits(x, 3)) * _half(s13 >> 16)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _WIDEN_ASM,
            "=r,=r,=r,=r,r,r,r,r,r",
            [w, s02, s13],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@triton.jit
def _widen8_half(w, s, PORTABLE: tl.constexpr):
    """Two tensors of value * 2^-7 from words of two e4m3 bytes; ``s`` holds the two scales as half floats."""
    # e4m3 bits in a half float are 2^-8 times the value, the scale is 2^7 times its value: 2^-6 makes the unit 2^-7.
    if PORTABLE:
        x = w.to(tl.int32)
        low = (_half(s) * 0.015625).to(tl.float16)
        high = (_half(s >> 16) * 0.015625).to(tl.float16)
        a = _half(((x << 8) & 0x8000) | ((x << 7) & 0x3F80)) * _over_columns(low)
        b = _half((x & 0x8000) | ((x >> 1) & 0x3F80)) * _over_columns(high)
    else:
        s = tl.inline_asm_elementwise(
            "{ .reg .b32 k; mov.b32 k, 0x24002400; mul.rn.f16x2 $0, $1, k; }",
            "=r,r",
            [s],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        a, b = tl.inline_asm_elementwise(
            _WIDEN8_ASM,
            "=r,=r,r,r,r",
            [w, _over_columns(s)],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return a, b


@triton.jit
def widen8(words, scales, C: tl.constexpr, PORTABLE: tl.constexpr):
    """`widen4` for e4m3 bytes: int32 [C * 256], per tile the words of quarters 0 and 1, then those of 2 and 3."""
    w = tl.reshape(words, [C, 2, 8, 4, 2, 2])
    low, high = tl.split(tl.permute(w, [0, 2, 3, 4, 5, 1]))
    s = ((scales << 7) & 0x7F80) | ((scales << 15) & 0x7F800000)
    a, b = _widen8_half(_words(low, C), s, PORTABLE)
    s = ((scales >> 9) & 0x7F80) | ((scales >> 1) & 0x7F800000)
    c, d = _widen8_half(_words(high, C), s, PORTABLE)
    return a, b, c, d


@triton.jit
def load_copy(ptr, QUARTER: tl.constexpr, C: tl.constexpr):
    """One token quarter of ``C`` tiles of the 16-bit plane: [C, 8, 4, 2, 2, 2] (tile a q w h e)."""
    at = tl.arange(0, C)[:, None] * 1024 + QUARTER * 256 + tl.arange(0, 256)[None, :]
    return tl.reshape(tl.load(ptr + at), [C, 8, 4, 2, 2, 2])


@triton.jit
def k_copy_operand(x, C: tl.constexpr):
    """16-bit K tiles to the operand [16 tokens, 16 * C dimensions], dimensions in the order of `split_query_operand`."""
    return tl.reshape(tl.permute(x, [4, 1, 0, 3, 2, 5]), [16, 16 * C])


@triton.jit
def v_copy_operand(x, C: tl.constexpr):
    """16-bit V tiles to the operand [16 * C dimensions, 16 tokens]."""
    return tl.reshape(tl.permute(x, [0, 4, 1, 3, 2, 5]), [16 * C, 16])


@triton.jit
def again(x, PORTABLE: tl.constexpr):
    """The same integer, but the compiler does not know: what is computed from it is computed again, not kept in registers."""
    if PORTABLE:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def query_index(C: tl.constexpr, N: tl.constexpr):
    """Query row and dimension of the elements that `query_operand` expects, both [16 * C * N]."""
    index = tl.arange(0, 16 * C * N)  # t n8 i q c
    row = index // 16 % N
    dim = index // (16 * N) * 16 + (index % 16 // 4) * 4 + index % 4  # in this form four neighbours are loaded at once
    return row, dim


@triton.jit
def query_operand(x, C: tl.constexpr, N: tl.constexpr):
    """Queries in the order of `query_index` to the operand [16 * C dimensions, N]."""
    x = tl.reshape(x, [C, N // 8, 8, 4, 4])  # t n8 i q c
    return tl.reshape(tl.permute(x, [0, 3, 4, 1, 2]), [16 * C, N])


@triton.jit
def split_query_operand(x, C: tl.constexpr, N: tl.constexpr):
    """`query_operand` for plain 16-bit tiles: dimension 4q + 2w + e of a tile comes as 8w + 2q + e."""
    x = tl.reshape(x, [C, N // 8, 8, 4, 2, 2])  # t n8 i q w e
    return tl.reshape(tl.permute(x, [0, 4, 3, 5, 1, 2]), [16 * C, N])


@triton.jit
def split_order(x, C: tl.constexpr):
    """Columns of [16, 16 * C] in the order of `split_query_operand`."""
    x = tl.reshape(x, [16, C, 4, 2, 2])  # row t q w e
    return tl.reshape(tl.permute(x, [0, 1, 3, 2, 4]), [16, 16 * C])


@triton.jit
def next_operand(p, N: tl.constexpr, DTYPE: tl.constexpr, ORDER: tl.constexpr, PORTABLE: tl.constexpr):
    """Accumulator rows as the second operand of the next product: float32 [16, N] to ``DTYPE`` [16, N].

    The 16 rows (tokens 8h + 2q + e) come out as 4q + 2h + e for ``ORDER`` 4 (packed planes) and unchanged for ``ORDER`` 2.
    On a GPU the 8 x 8 corners are transposed between lanes by one instruction each. It acts on registers, so ``p`` must
    still have the layout of an accumulator, which elementwise functions of `tl.dot` results have.
    """
    x = p.to(DTYPE)
    if PORTABLE:
        if ORDER == 4:
            x = tl.reshape(x, [2, 4, 2, N])  # h q e n
            x = tl.reshape(tl.permute(x, [1, 0, 2, 3]), [16, N])
    else:
        x = tl.inline_asm_elementwise(_MOVMATRIX_ASM, "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
        x = tl.reshape(x, [2, 8, N // 8, 4, 2])  # h i n8 q e: row i now is query i, columns are tokens 2q + e
        if ORDER == 4:
            x = tl.permute(x, [3, 0, 4, 2, 1])  # q h e n8 i
        else:
            x = tl.permute(x, [0, 3, 4, 2, 1])  # h q e n8 i
        x = tl.reshape(x, [16, N])
    return x


@triton.jit
def over_rows(ptr, N: tl.constexpr):
    """One float32 per query, the same in every row of an accumulator: [16, N] from N contiguous numbers."""
    index = tl.arange(0, 8 * N)
    offset = (index // 64) * 8 + ((index % 8) // 2) * 2 + index % 2
    x = tl.load(ptr + offset)
    x = tl.permute(tl.reshape(x, [N // 8, 8, 4, 2]), [1, 0, 2, 3])  # i n8 q e
    x = tl.reshape(x, [1, 8, N])
    return tl.reshape(tl.broadcast_to(x, [2, 8, N]), [16, N])
