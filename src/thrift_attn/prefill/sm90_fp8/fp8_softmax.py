"""Numbers of `thrift_attn.prefill.sm90_fp8.kernel`: from raw FP8 products of a tile to e4m3 codes of P, without an exponential.

Logits are in eighths of a power of two. Block b of a row has x = s8 * a_b + (q.c_b - m), a_b = q_scale * k_scale_b * scale * 8
log2(e). s8 comes in half precision (sums of D products stay within it, see `thrift_attn.reference.formats`), two to
a register, and
one packed multiply-add makes t = x + `PEAK` + `EXPONENT_BIAS` of both, not below 0. Rounded to an integer, t *is* the e4m3 code
of P: the exponent and mantissa of a small float, read as one number, are its logarithm taken linearly between
powers of two. Such a code stands for up to 6.1% more than P, `EVEN` on average over a binade; that is divided out with the
row sum, which is taken from the same codes. What remains is 1.9% (root mean square) beside the 2.5% of rounding to 3 bits.

A tile of products ``[64, 128]`` is handled as words ``[64, 2, 8, 4]``: row, block, eight columns, lane, two columns to a word.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.language import PropagateNan

from thrift_attn.prefill.sm90_fp8.loader import HIDDEN, LOG2E, TILES

_KEPT = gl.constexpr(PropagateNan.ALL)  # NaN
LARGE = gl.constexpr(8000.0)  # bound of terms in half precision, so that no infinity meets that of a hidden logit
EVEN = gl.constexpr(1.0397208)  # 1.5 * ln 2: how much larger than P its codes are on average
PEAK = gl.constexpr(
    8 * 8.528766
)  # 8 log2(384 / EVEN): the largest P has the code of 384, the others 384 * P on average
EXPONENT_BIAS = gl.constexpr(8 * 7.0)  # of e4m3
_HALVES = gl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")
_LARGER = gl.constexpr("max.f16x2 $0, $1, $2;")
_LARGEST = gl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $1;
    max.f16 low, low, high;
    cvt.f32.f16 $0, low;
}""")
_TWICE = gl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")
# Four codes: t = max(s * $3 + $4, 0), then 1024 + t, whose last bits are t rounded to an integer.
_CODES = gl.constexpr("""{
    .reg .b32 a, b, k;
    mov.b32 k, 0x64006400;
    fma.rn.relu.f16x2 a, $1, $3, $4;
    fma.rn.relu.f16x2 b, $2, $3, $4;
    add.rn.f16x2 a, a, k;
    add.rn.f16x2 b, b, k;
    prmt.b32 $0, a, b, 0x6420;
}""")
_PACK = gl.constexpr("""{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}""")


@gluon.jit
def _over_blocks(v, FULL: gl.constexpr):
    """[64, 2] to [64, 2, 1, 1] of layout FULL."""
    v = gl.convert_layout(v, gl.SliceLayout(2, gl.SliceLayout(3, FULL)))
    return gl.expand_dims(gl.expand_dims(v, 2), 3)


@gluon.jit
def over_rows(v, MMA: gl.constexpr):
    """[64] to [64, 1] of layout MMA."""
    return gl.expand_dims(gl.convert_layout(v, gl.SliceLayout(1, MMA)), 1)


@gluon.jit
def softcapped(s, slope, cap):
    """cap * tanh(s * u) in units of log2, u half of ``slope`` / log2(e): tanh(y) = 1 - 2 / (exp(2 y) + 1)."""
    # Not that of `thrift_attn.kernels.arithmetic`: the cap is an argument here and a constant of the compiled kernel there, and
    # the products come as they are, with the scale of the logits in ``slope``.
    return cap * (1 - 2 / (gl.exp2(s * slope) + 1))


@_core.builtin
def in_flight(token, _semantic=None):
    """The registers of a product that has been started, as a tensor."""
    return _core.tensor(token.handle, token.type.tensor_type)


@gluon.jit
def as_words(s):
    """Half precision [64, 128] as int32 [64, 2, 8, 4] (row, block, eight columns, lane): two neighbours to a word.

    Nothing but another name for the same registers: the compiler sees through it, so that it may come before the wait.
    """
    even, odd = s.reshape([64, 2, 8, 4, 2]).split()
    return (even.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF) | (odd.to(gl.int16, bitcast=True).to(gl.int32) << 16)


@gluon.jit
def _of_rows(v, FULL: gl.constexpr):
    """[64] to [64, 1, 1, 1] of layout FULL."""
    v = gl.convert_layout(v, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, FULL))))
    return _over_blocks(gl.expand_dims(v, 1), FULL)


@gluon.jit
def _masked(words, limits):
    """Words with minus infinity where a column is not in [first, end) of its row ``[64]``."""
    FULL: gl.constexpr = words.type.layout
    end, first = _of_rows(limits[0], FULL), _of_rows(limits[1], FULL)
    block = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, FULL))))
    eight = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, FULL))))
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, FULL))))
    block = _over_blocks(gl.expand_dims(block, 0), FULL)
    eight = gl.expand_dims(gl.expand_dims(gl.expand_dims(eight, 0), 1), 3)
    lane = gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 1), 2)
    col = block * 64 + eight * 8 + lane * 2
    low = gl.where((col < end) & (col >= first), words & 0xFFFF, 0xFC00)  # 0xFC00 is minus infinity
    high = gl.where((col + 1 < end) & (col + 1 >= first), words & -0x10000, -0x4000000)
    return low | high


@gluon.jit
def _halves(w, AT: gl.constexpr):
    """Even and odd entries of dimension 2 of a tensor of four dimensions."""
    N: gl.constexpr = w.shape[2] // 2
    if AT == "neighbours":
        return w.reshape([w.shape[0], w.shape[1], N, 2, w.shape[3]]).permute((0, 1, 2, 4, 3)).split()
    else:
        return w.reshape([w.shape[0], w.shape[1], 2, N, w.shape[3]]).permute((0, 1, 3, 4, 2)).split()


@gluon.jit
def _larger(w):
    a, b = _halves(w, "ends")
    return gl.inline_asm_elementwise(_LARGER, "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _twice(x):
    """float32 as two equal numbers in half precision, bounded by LARGE; NaN stays."""
    x = gl.minimum(x, LARGE, propagate_nan=_KEPT)
    return gl.inline_asm_elementwise(_TWICE, "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def load_terms(bias_smem, slope_smem, tile, HALF: gl.constexpr, PAIR: gl.constexpr):
    """What the loader left for one tile: bias [64, 2], and the slope of each block [2]."""
    place = ((tile // TILES & 1) * 2 + HALF) * TILES + tile % TILES
    return bias_smem.index(place).load(PAIR), slope_smem.index(place).load(gl.SliceLayout(0, PAIR))


@gluon.jit
def update_maximum(x, m, terms, cap, limits, MASK: gl.constexpr, CAP: gl.constexpr, PAIR: gl.constexpr):
    """Running maximum with one more tile of 128 tokens.

    Args:
        x: raw FP8 products, as `as_words`.
        m: running maximum ``[64]``.
        limits: one past the last visible and the first visible column of each row ``[64]``; read if MASK.

    Returns:
        What it was given, masked, or if CAP the logits ``[64, 2, 8, 4, 2]`` themselves; and the new maximum.
    """
    bias, slope = terms
    ROWS: gl.constexpr = gl.SliceLayout(1, PAIR)
    if MASK:
        x = _masked(x, limits)
    if CAP:
        low, high = gl.inline_asm_elementwise(
            _HALVES, "=f,=f,r", [x], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
        )
        x = gl.join(low, high)  # [64, 2, 8, 4, 2]
        FULL: gl.constexpr = gl.SliceLayout(4, x.type.layout)
        x = x * gl.expand_dims(_over_blocks(gl.expand_dims(slope, 0), FULL), 4)
        x = x + gl.expand_dims(_over_blocks(bias, FULL), 4)
        # Written out for logits in eighths of a power of two, unpacked from half precision. A call of `softcapped` computes the
        # same, but the compiler then makes other machine code of the whole loop, which has been neither tested nor timed.
        e = gl.exp2(x * (0.25 * LOG2E / cap))  # as in `softcapped`; x and its bound are in eighths
        x = gl.where(x < 0.1 * HIDDEN, float("-inf"), 8 * cap * (1 - 2 / (e + 1)))
        top = gl.max(gl.max(gl.max(x, axis=4), axis=2), axis=1)
    else:
        top = _larger(_larger(_larger(x))).reshape([64, 2, 4])
        top = gl.inline_asm_elementwise(_LARGEST, "=f,r", [top], dtype=gl.float32, is_pure=True, pack=1)
        LANES: gl.constexpr = top.type.layout
        addend = gl.expand_dims(gl.convert_layout(bias, gl.SliceLayout(2, LANES)), 2)
        factor = gl.convert_layout(gl.expand_dims(slope, 0), gl.SliceLayout(2, LANES))
        top = gl.max(top * gl.expand_dims(factor, 2) + addend, axis=1)
    m_new = gl.maximum(gl.convert_layout(m, ROWS), gl.convert_layout(gl.max(top, axis=1), ROWS))
    return x, gl.convert_layout(m_new, m.type.layout)


@gluon.jit
def code_probabilities(x, m, terms, CAP: gl.constexpr, PAIR: gl.constexpr):
    """e4m3 codes of P' from what `update_maximum` returned, four to a word: int32 ``[64, 8, 4]``.

    They are already in the order of the next product's operand.
    """
    bias, slope = terms
    shift = PEAK - gl.expand_dims(gl.convert_layout(m, gl.SliceLayout(1, PAIR)), 1)
    if CAP:
        FULL: gl.constexpr = gl.SliceLayout(4, x.type.layout)
        p = gl.exp2(0.125 * (x + gl.expand_dims(_over_blocks(shift, FULL), 4))) * EVEN
        return _pack(p)
    else:
        a, b = _halves(x, "neighbours")  # [64, 2, 4, 4]
        W: gl.constexpr = a.type.layout
        shift = _over_blocks(_twice(bias + (shift + EXPONENT_BIAS)), W)
        factor = _over_blocks(gl.expand_dims(_twice(slope), 0), W)
        codes = gl.inline_asm_elementwise(
            _CODES, "=r,r,r,r,r", [a, b, factor, shift], dtype=gl.int32, is_pure=True, pack=1
        )
        return codes.reshape([64, 8, 4])


@gluon.jit
def _pack(p):
    """float32 P' ``[64, 2, 8, 4, 2]`` as `code_probabilities` returns them."""
    even, odd = p.reshape([64, 8, 2, 4, 2]).permute((0, 1, 3, 2, 4)).split()
    b0, b2 = even.split()
    b1, b3 = odd.split()
    return gl.inline_asm_elementwise(_PACK, "=r,f,f,f,f", [b0, b1, b2, b3], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def as_operand(words, OUT: gl.constexpr):
    """Words of `_pack` as the left operand e4m3 ``[64, 128]``; no element changes its register."""
    pairs = gl.join(words, words)
    words = gl.join(pairs, pairs).reshape([64, 128])
    words = gl.convert_layout(words, gl.DotOperandLayout(0, OUT, 4), assert_trivial=True)
    codes = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [words], dtype=gl.int8, is_pure=True, pack=4)
    return codes.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def visible_columns(row, tile, key_end, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Columns [first, end) of a tile that the rows at these positions see."""
    end = gl.full_like(row, 0) + key_end - tile * 128
    if CAUSAL:
        end = gl.minimum(end, row + 1 - tile * 128)
    first = gl.full_like(row, 0)
    if WINDOW:
        first = row + 1 - window - tile * 128
    return end, first
