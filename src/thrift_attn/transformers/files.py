"""A `ThriftCache` in a safetensors file: prompts that are computed once and used for as long as the file lives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from thrift_attn.cache import state
from thrift_attn.config import ThriftConfig, current_names
from thrift_attn.transformers.padding import Padding
from thrift_attn.transformers.thrift_layer import ThriftLayer

FORMAT = 3
"""Version of the files."""


class Filled(Protocol):
    """What a file needs of a `thrift_attn.transformers.ThriftCache`."""

    layers: list[Any]

    @property
    def decode(self) -> ThriftConfig:
        """What is stored."""
        ...

    def get_seq_length(self) -> int:
        """Slots."""
        ...

    def reset(self) -> None:
        """Empty it."""
        ...


def save(cache: Filled, path: str | Path) -> None:
    """Write what a cache holds; a page that sequences share is written once.

    Args:
        cache: not empty, and not in the middle of a forward.
        path: the file.

    Raises:
        ValueError: an empty cache.
    """
    from safetensors.torch import save_file

    if not cache.get_seq_length():
        raise ValueError("the cache is empty: there is nothing to save")
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for at, layer in enumerate(cache.layers):
        if isinstance(layer, ThriftLayer):
            found = state.dump(layer.paged)
            found |= {f"padding{i}": padding.is_token.clone() for i, padding in enumerate(layer.paddings)}
            described.append({"slots": layer.slots, "paddings": [padding.start for padding in layer.paddings]})
        else:
            found = {"keys": layer.keys, "values": layer.values}
            described.append({"cumulative_length": layer.cumulative_length})
        tensors |= {f"{at}.{name}": x.contiguous() for name, x in found.items()}
    about = {"format": FORMAT, "decode": cache.decode.to_dict(), "layers": described}
    save_file(tensors, str(path), metadata={"thrift_cache": json.dumps(about)})


def load(cache: Filled, path: str | Path, device: torch.device | str) -> None:
    """Fill an empty cache with what `save` wrote.

    Args:
        cache: for the same model, storing K and V in the same way.
        path: the file.
        device: where the model runs.

    Raises:
        ValueError: another kind of file, other layers, or another way of storing K and V.
        RuntimeError: the pages are exhausted; the cache is empty again.
    """
    from safetensors import safe_open

    if any(layer.get_seq_length() for layer in cache.layers):
        raise ValueError("the cache is not empty: reset() it first")
    with safe_open(str(path), "pt", device=str(device)) as file:
        about = json.loads((file.metadata() or {}).get("thrift_cache", "{}"))
        _check(cache, path, about)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    try:
        for at, (layer, described) in enumerate(zip(cache.layers, about["layers"], strict=True)):
            start = f"{at}."
            found = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
            _restore(layer, described, found)
    except BaseException:
        cache.reset()
        raise


def _check(cache: Filled, path: str | Path, about: dict[str, Any]) -> None:
    """Raise ValueError unless a file's description fits a cache."""
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file that ThriftCache.save wrote, format {FORMAT}")
    theirs, ours = (
        {name: told.get(name) for name in ("base_format", "promoted_storage", "center", "sink_token")}
        for told in (current_names(about["decode"], warn=False), cache.decode.to_dict())
    )
    if theirs != ours:
        raise ValueError(f"{path} stores K and V as {theirs}, this cache as {ours}")
    kinds = ["slots" in described for described in about["layers"]]
    if kinds != [isinstance(layer, ThriftLayer) for layer in cache.layers]:
        raise ValueError(f"{path} holds {len(kinds)} layers, {sum(kinds)} of them paged: another model")


def _restore(layer: Any, described: dict[str, Any], found: dict[str, Tensor]) -> None:
    """Fill one empty layer from the tensors of a file."""
    if not isinstance(layer, ThriftLayer):
        layer.lazy_initialization(found["keys"], found["values"])
        layer.keys, layer.values = found["keys"], found["values"]
        layer.cumulative_length = described["cumulative_length"]
        return
    _, batch, _, heads, _, dim = found["tail"].shape
    if not layer.is_initialized or layer.paged.batch != batch:
        shaped = found["tail"].new_empty(batch, heads, 0, dim)
        layer.lazy_initialization(shaped, shaped)
    state.restore(layer.paged, found)
    layer.slots = described["slots"]
    for at, start in enumerate(described["paddings"]):
        is_token = found[f"padding{at}"]
        layer.paddings.append(Padding(start, is_token, is_token.sum(1).tolist()))
