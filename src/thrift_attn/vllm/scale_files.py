"""Powers of two that K and V are packed with, one set a layer for all sequences, and the file that holds those of a model."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_attn.reference.channel_scales import level_keys, level_values, mean_squares, within_reach

KEYS, VALUES = "k_channel_scale.{}", "v_head_scale.{}"
"""Names in the file by the number of a layer in its model: float32 ``[Hkv, D]`` and ``[Hkv]``, all heads of the model."""


class LayerScales(NamedTuple):
    """Powers of two of one layer: K float32 ``[Hkv, D]``, V float32 ``[Hkv]``."""

    k_channel_scale: Tensor
    v_head_scale: Tensor


def measure(k: Tensor, v: Tensor, *, centred: bool) -> LayerScales:
    """Take the scales of a layer from K and V ``[Hkv, T, D]`` of a text, the first block aside where there are others.

    Args:
        k: as it is cached.
        v: likewise.
        centred: whether pages hold K less its block means.
    """
    k, v = k.float(), v.float()
    start = BLOCK if k.shape[1] >= 2 * BLOCK else 0  # attention sinks are unlike all others, and only bound the scales
    squares = mean_squares(k[:, start:], v[:, start:], centred)
    whole = k[:, : k.shape[1] // BLOCK * BLOCK].unflatten(1, (-1, BLOCK))
    packed = (whole - whole.mean(2, keepdim=True) if centred else whole).flatten(1, 2)
    largest_k = (packed if packed.shape[1] else k).abs().amax(1)
    return LayerScales(
        within_reach(level_keys(squares), largest_k), within_reach(level_values(squares), v.abs().amax((1, 2)))
    )


def write_scales(path: Path, scales: dict[int, LayerScales], **told: str) -> None:
    """Write a file of scales.

    Args:
        path: where to.
        scales: by the number of a layer.
        **told: what readers may want to know.
    """
    from safetensors.torch import save_file

    tensors = {KEYS.format(n): one.k_channel_scale.contiguous() for n, one in scales.items()}
    tensors |= {VALUES.format(n): one.v_head_scale.contiguous() for n, one in scales.items()}
    save_file(tensors, str(path), metadata={"format": "thrift scales", **told})


def read_scales(path: str, layers: dict[int, tuple[int, int]], *, rank: int, ranks: int) -> dict[int, LayerScales]:
    """Read the scales of a rank.

    Args:
        path: of the file.
        layers: by the number of a layer, its KV heads on this rank and its head dimension.
        rank: of tensor parallelism.
        ranks: how many there are. Where they are more than heads, some hold the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no such layer, or other heads: it is that of another model.
    """
    from safetensors import safe_open

    found = {}
    with safe_open(path, framework="pt") as file:
        there = set(file.keys())
        for number, (heads, dim) in layers.items():
            names = KEYS.format(number), VALUES.format(number)
            if not there.issuperset(names):
                raise ValueError(f"{path} has no scales of layer {number}: is it of this model?")
            k, v = (file.get_tensor(name) for name in names)
            total = len(k)
            if k.shape != (total, dim) or v.shape != (total,) or heads != max(1, total // ranks):
                raise ValueError(
                    f"{path} has scales of {list(k.shape)} for layer {number}, which has {heads} KV heads of {dim} on each of "
                    f"{ranks} ranks: is it of this model?"
                )
            first = rank * total // ranks
            found[number] = LayerScales(k[first : first + heads].float(), v[first : first + heads].float())
    return found
