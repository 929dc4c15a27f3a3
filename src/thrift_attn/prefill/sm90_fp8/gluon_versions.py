"""The Gluon of Triton 3.6 to 3.9 under one set of names: what was renamed between them and means the same."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.hopper import tma

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # of 3.6; from 3.7 on
tma_load = (
    tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
)  # the old name raises in 3.9
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_REINTERPRET = "reinterpret" if hasattr(gl.shared_memory_descriptor, "reinterpret") else "_reinterpret"


@_core.builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """Return the same shared memory as another dtype, shape and layout."""
    return getattr(memory, _REINTERPRET)(dtype, shape, layout, _semantic=_semantic)
