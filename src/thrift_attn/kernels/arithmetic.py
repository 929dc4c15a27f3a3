"""Arithmetic that kernels of prefill and of decode share: products of 16-bit data, the soft cap, the k-th largest number."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
"""Kernels work with exponentials to base 2: logits are multiplied by this, LSEs divided."""


@triton.jit
def dot(a, b, PORTABLE: tl.constexpr, acc=None):
    """Product of 16-bit operands, in float32 if PORTABLE: the interpreter's product of bfloat16 is wrong."""
    if PORTABLE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def softcapped(s, CAP: tl.constexpr):
    """CAP * tanh(s / CAP) of logits to base 2; CAP is the soft cap times log2(e)."""
    e = tl.exp2(s * (2.8853900817779268 / CAP))  # exp(2 x / cap), x the logit to base e
    return CAP - 2.0 * CAP / (e + 1.0)


@triton.jit
def threshold_of_largest(key, wanted, PAD: tl.constexpr):
    """The largest thresholds [R] that at least ``wanted`` [R] of the int32 keys [R, PAD] reach, or ones that exactly so many
    reach: found bit by bit, for all rows at once."""
    # The sign bit counts the other way round.
    reached = tl.sum((key >= 0).to(tl.int32), 1)
    threshold = tl.where(reached >= wanted, 0, -0x7FFFFFFF - 1)
    held = tl.where(reached >= wanted, reached, PAD)
    bit = 30
    while (bit >= 0) & (tl.max((held != wanted).to(tl.int32), 0) > 0):
        trial = threshold + (1 << bit)
        reached = tl.sum((key >= trial[:, None]).to(tl.int32), 1)
        threshold = tl.where(reached >= wanted, trial, threshold)
        held = tl.where(reached >= wanted, reached, held)
        bit -= 1
    return threshold
