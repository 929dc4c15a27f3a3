"""What runs on which device: natively, compiled but not timed, emulated, or not at all, and why."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, NamedTuple

import torch

from thrift_attn.config import ThriftConfig

Status = Literal["native", "emulated", "no"]


class Row(NamedTuple):
    """One line of the support table."""

    feature: str
    status: Status
    why: str


def support(device: torch.device | str | None = None) -> list[Row]:
    """Support table of a device.

    Args:
        device: a torch device; by default the first CUDA device if there is one, else the CPU.

    Returns:
        One row per feature of the library.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    plain = f"plain PyTorch on {where}: every value exact to the format's definition, no speed gained"
    rows = [
        Row("attention(), any low, math and high", "emulated", plain),
        Row("attention(), backend='triton'", "no", "fused prefill kernels are not written yet"),
    ]
    try:
        backend = check_cache(ThriftConfig(math="16bit", high="nested"), 128, torch.bfloat16, device)
    except NotImplementedError as error:
        return [*rows, Row("PagedThriftCache", "no", str(error))]
    if backend == "reference":
        return [*rows, Row("PagedThriftCache", "emulated", "pages are written and read in plain PyTorch")]
    dims = ", ".join(map(str, HEAD_DIMS))
    timed = "timed" if torch.cuda.get_device_capability(device) == (9, 0) else "compiled for this GPU, not timed on one"
    return [*rows, Row("PagedThriftCache, low='nvfp4' | 'mxfp4'", "native", f"kernels for head_dim {dims}; {timed}")]


HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head dimensions the kernels are built and tested for."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, compute capability 9 and up)."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def check_cache(
    config: ThriftConfig, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Literal["triton", "reference"]:
    """Backend of a paged cache: kernels on a CUDA device, plain PyTorch on a CPU.

    Raises:
        TypeError: an unsupported dtype.
        ValueError: a head dimension that pages cannot hold.
        NotImplementedError: a config, head dimension or device the cache does not serve, with the reason.
    """
    kernels = device.type == "cuda" or interpreted()
    if dtype not in (torch.float16, torch.bfloat16) and (kernels or dtype != torch.float32):
        raise TypeError(f"a cache on {device.type} holds float16 or bfloat16, got {dtype}")
    if head_dim < 16 or head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}")
    if config.math != "16bit":
        raise NotImplementedError(
            f"the cache computes math='16bit' (Q and P are not quantised), got math={config.math!r}"
        )
    if config.low not in ("nvfp4", "mxfp4"):
        raise NotImplementedError(f"the cache stores low='nvfp4' or 'mxfp4', got low={config.low!r}")
    if config.low == "mxfp4" and head_dim % 32:
        raise ValueError(f"low='mxfp4' needs a head_dim that is a multiple of 32, got {head_dim}")
    if config.score != "mean":
        raise NotImplementedError(f"the cache scores blocks by score='mean', got score={config.score!r}")
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"the cache runs on cpu and cuda devices, got {device.type}")
    if not kernels:
        return "reference"
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"the kernels serve head_dim {', '.join(map(str, HEAD_DIMS))}, got {head_dim}")
    if importlib.util.find_spec("triton") is None:
        raise NotImplementedError("the cache's kernels need triton: pip install 'thrift-attn[kernels]'")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise NotImplementedError("the cache's kernels need a GPU of compute capability 8.0 or newer")
    return "triton"


def pick_backend(asked: str) -> Literal["reference"]:
    """Backend for a call of `thrift_attn.attention`.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: a backend that cannot serve the call, with the reason.
    """
    if asked not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be one of 'auto', 'reference', 'triton', got {asked!r}")
    if asked == "triton":
        raise NotImplementedError(
            "backend='triton': fused prefill kernels are not written yet; use backend='reference'"
        )
    return "reference"
