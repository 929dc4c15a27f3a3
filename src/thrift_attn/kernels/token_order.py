"""The order of tokens in native e4m3 V, in which an accumulator of a tensor core product is the operand of the next.

Of each 16 tokens, token bits 3 2 1 0 become position bits 2 1 3 0::

    token     0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
    position  0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl  # noqa: F401 (the interpreter of Triton looks for it beside a kernel)
from torch import Tensor


def position_of(tokens: int) -> Tensor:
    """Return where each token lies: int64 ``[tokens]``, in the order of tokens.

    Args:
        tokens: a multiple of 16.
    """
    t = torch.arange(tokens)
    return (t & ~15) | (t & 1) | ((t & 8) >> 2) | ((t & 6) << 1)


@triton.jit
def token_at(position):
    """The token of a block of 64 that lies at each position: the inverse of `position_of`."""
    return (position & 0x31) | ((position & 2) << 2) | ((position & 12) >> 1)
