"""What runs on which device: natively, compiled but not timed, emulated, or not at all, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

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
    formats = f"PyTorch reference in float32 on {where}: every value exact to the format's definition, no speed gained"
    return [
        Row("attention(), backend='reference'", "native", f"plain PyTorch, runs on {where}"),
        Row("attention(), backend='triton'", "no", "fused prefill kernels are not written yet"),
        Row("low='nvfp4' | 'mxfp4' | 'fp8', math='fp4'", "emulated", formats),
        Row("low='nvfp4' | 'mxfp4' | 'fp8', math='16bit'", "emulated", formats),
    ]


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
