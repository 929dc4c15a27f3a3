"""How every kernel is started: one function, so that what CUDA refuses is refused in words and before anything runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MAX_GRID = 65535
"""Most programs along the second and the third axis of a grid; the first holds 2^31 - 1."""


def launch(kernel: Any, grid: tuple[int, ...], /, *args: Any, **meta: Any) -> None:
    """Start a Triton kernel on the current device; a grid without programs starts nothing.

    Args:
        kernel: a function of `triton.jit` or `gluon.jit`.
        grid: programs along each axis.
        args: its arguments by position.
        meta: its arguments by name, and Triton's options.

    Raises:
        ValueError: more programs along the second or the third axis than CUDA starts.
    """
    if max(grid[1:], default=0) > MAX_GRID:
        name = getattr(kernel, "__name__", "kernel")
        raise ValueError(f"{name} runs at most {MAX_GRID} heads and as many sequences, got a grid of {list(grid)}")
    if 0 not in grid:
        kernel[grid](*args, **meta)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels start on the GPU that ``x`` lies on; nothing changes for a tensor of the CPU.

    Triton starts a kernel on the *current* device and its stream, wherever the tensors are. Every entry point that starts
    kernels needs this context once.
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def check_planes(**planes: Tensor) -> None:
    """Raise ValueError unless the last dimension of each plane ``[pages, Hkv, ...]`` is contiguous and every head of every
    page begins at a multiple of 16 bytes: kernels load that much at a time."""
    for name, x in planes.items():
        page, head, last = x.stride()
        pages, heads, _ = x.shape
        steps = page * (pages > 1) | head * (heads > 1)
        if last != 1 or (steps * x.element_size() | x.data_ptr()) & 15:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, and its pages and heads must begin at multiples of 16 "
                f"bytes; got strides {list(x.stride())} of {x.element_size()} bytes, {x.data_ptr() % 16} bytes too far"
            )


def check_rows(**tensors: Tensor) -> None:
    """Raise ValueError unless the last dimension of each tensor is contiguous, as kernels take for granted."""
    for name, x in tensors.items():
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {list(x.stride())}")
