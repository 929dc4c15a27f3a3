"""Columns of `thrift_attn.seq_layout.SeqLayout.spans` as constants of kernels."""

from __future__ import annotations

import triton.language as tl

import thrift_attn.seq_layout as seq_layout

SPAN = tl.constexpr(seq_layout.SPAN)
Q_START = tl.constexpr(seq_layout.Q_START)
Q_LEN = tl.constexpr(seq_layout.Q_LEN)
K_START = tl.constexpr(seq_layout.K_START)
K_LEN = tl.constexpr(seq_layout.K_LEN)
Q_BLOCK_START = tl.constexpr(seq_layout.Q_BLOCK_START)
BLOCK_START = tl.constexpr(seq_layout.BLOCK_START)
