"""A `ThriftCache` in a safetensors file: prompts that are computed once and used for as long as the file lives."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from thrift_attn.cache import state
from thrift_attn.config import ThriftConfig, current_names
from thrift_attn.transformers.padding import Padding
from thrift_attn.transformers.thrift_layer import ThriftLayer

FORMAT = 6
"""Version of the files that are written."""

NAMES_BEFORE = {5: {"slots": "tail_blocks", "centres": "k_block_mean"}}
"""Other versions that are read, and today's names for theirs of tensors."""


class Filled(Protocol):
    """What a file needs of a `thrift_attn.transformers.ThriftCache`."""

    layers: list[Any]
    identity: dict[str, Any]

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


IDENTITY = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "rope_theta",
    "layer_types",
    "sliding_window",
    "dtype",
)
"""Options of a model's configuration that decide what its K and V are; weights are not looked at."""


def identity_of(text_config: Any) -> dict[str, Any]:
    """Return the options of `IDENTITY` that a decoder's configuration has, as plain JSON values."""
    told = text_config.to_dict()  # some options differ by layer and cannot be read as one attribute
    return json.loads(json.dumps({name: told.get(name) for name in IDENTITY}, default=str))


def _digest(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a description but for its digest, and of names, dtypes, shapes and bytes of tensors."""
    described = {name: value for name, value in about.items() if name != "digest"}
    total = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save(cache: Filled, path: str | Path) -> None:
    """Write what a cache holds; a page that sequences share is written once.

    Args:
        cache: not empty, and not in the middle of a forward.
        path: the file.

    Raises:
        ValueError: an empty cache.
        FileNotFoundError: no such folder.
    """
    from safetensors.torch import save_file

    if not cache.get_seq_length():
        raise ValueError("the cache is empty: there is nothing to save")
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for at, layer in enumerate(cache.layers):
        if isinstance(layer, ThriftLayer):
            found = state.state_dict(layer.paged)
            found |= {f"padding{i}": padding.is_token.clone() for i, padding in enumerate(layer.paddings)}
            described.append({"slots": layer.slots, "paddings": [padding.start for padding in layer.paddings]})
        else:
            found = {"keys": layer.keys, "values": layer.values}
            described.append({"cumulative_length": layer.cumulative_length})
        tensors |= {f"{at}.{name}": x.contiguous() for name, x in found.items()}
    about = {
        "format": FORMAT,
        "model": cache.identity,
        "decode": cache.decode.to_dict(),
        "layers": described,
    }
    about["digest"] = _digest(about, tensors)
    path = os.fsdecode(path)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"there is no folder {Path(path).parent} to write {Path(path).name} into")
    unfinished = f"{path}.{os.getpid()}.unfinished"
    try:
        save_file(tensors, unfinished, metadata={"thrift_cache": json.dumps(about)})
        os.replace(unfinished, path)  # whole or not at all
    finally:
        Path(unfinished).unlink(missing_ok=True)


def load(cache: Filled, path: str | Path, device: torch.device | str) -> None:
    """Fill an empty cache with what `save` wrote.

    Args:
        cache: for the same model, storing K and V in the same way.
        path: the file.
        device: where the model runs.

    Raises:
        ValueError: another kind of file, a damaged one, another model, or another way of storing K and V.
        RuntimeError: the pages are exhausted; the cache is empty again.
    """
    from safetensors import SafetensorError, safe_open

    path, device = os.fsdecode(path), _checked_device(device)
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file that ThriftCache.save wrote")
    if any(layer.get_seq_length() for layer in cache.layers):
        raise ValueError("the cache is not empty: reset() it first")
    try:
        with safe_open(str(path), "pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {}).get("thrift_cache", "{}"))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or in another format: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} is damaged: it is described by {type(about).__name__}, not by names")
    if about.get("format") in (FORMAT, *NAMES_BEFORE) and _digest(about, tensors) != about.get("digest"):
        raise ValueError(f"{path} is damaged: its contents are not those that were saved")
    _check(cache, path, about)
    renamed = NAMES_BEFORE.get(about["format"], {})
    bare = [layer for layer in cache.layers if isinstance(layer, ThriftLayer) and not layer.is_initialized]
    try:
        others = {name for name in tensors if name.partition(".")[0] not in map(str, range(len(cache.layers)))}
        if others:
            raise ValueError(f"{path} holds tensors of no layer: {', '.join(sorted(others))}")
        for at, (layer, described) in enumerate(zip(cache.layers, about["layers"], strict=True)):
            start = f"{at}."
            found = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
            _load_layer(layer, described, {renamed.get(name, name): x for name, x in found.items()})
        _check_layers(path, cache)
    except BaseException as error:
        cache.reset()
        for layer in bare:
            layer.discard()  # the next tokens decide its shape and dtype, not the file
        if isinstance(error, (KeyError, IndexError, TypeError, AttributeError)):
            raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error
        raise


def _checked_device(device: torch.device | str) -> torch.device:
    """A device that tensors can be on now, so that no file is blamed for it.

    Raises:
        ValueError: a device that there is not.
    """
    try:
        return torch.empty(0, device=device).device if str(device) != "meta" else torch.device("none")
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be one that torch finds here, such as 'cpu', got {device!r}") from error


def _check(cache: Filled, path: str | Path, about: dict[str, Any]) -> None:
    """Raise ValueError unless a file's description fits a cache."""
    if "format" not in about:
        raise ValueError(f"{path} is not a file that ThriftCache.save wrote")
    if about["format"] not in (readable := (*NAMES_BEFORE, FORMAT)):
        raise ValueError(f"{path} must have format {' or '.join(map(str, readable))}, got {about['format']!r}")
    model = about.get("model")
    if model != cache.identity:
        told = model if isinstance(model, dict) else {}
        other = [f"{name} {told.get(name)!r} in place of {cache.identity[name]!r}" for name in IDENTITY
                 if told.get(name) != cache.identity[name]]  # fmt: skip
        raise ValueError(f"{path} holds K and V of another model: {', '.join(other)}")
    if not isinstance(about.get("decode"), dict):
        raise ValueError(f"{path} is damaged: it does not say how K and V are stored")
    theirs, ours = (
        {name: told.get(name) for name in ("base_format", "promoted_storage", "center", "sink_token")}
        for told in (current_names(about["decode"], warn=False), cache.decode.to_dict())
    )
    if theirs != ours:
        raise ValueError(f"{path} stores K and V as {theirs}, this cache as {ours}")
    layers = about.get("layers")
    if not isinstance(layers, list) or not all(isinstance(described, dict) for described in layers):
        raise ValueError(f"{path} is damaged: it does not describe its layers")
    kinds = ["slots" in described for described in layers]
    if kinds != [isinstance(layer, ThriftLayer) for layer in cache.layers]:
        raise ValueError(f"{path} holds {len(kinds)} layers, {sum(kinds)} of them paged: another model")


def _check_layers(path: str | Path, cache: Filled) -> None:
    """Raise ValueError unless all paged layers hold as many tokens as their slots show."""
    lengths = set()
    for layer in cache.layers:
        if isinstance(layer, ThriftLayer):
            tokens = [layer.paged.tokens(seq) for seq in range(layer.paged.batch)]
            hidden = [sum(p.is_token.shape[1] - p.counts[seq] for p in layer.paddings) for seq in range(len(tokens))]
            lengths.add((layer.slots, *tokens))
            if any(count + less != layer.slots for count, less in zip(tokens, hidden, strict=True)):
                raise ValueError(f"{path} is damaged: {tokens} tokens do not fill {layer.slots} slots")
    if len(lengths) > 1:
        raise ValueError(f"{path} is damaged: its layers hold different numbers of tokens")


def _load_layer(layer: Any, described: dict[str, Any], found: dict[str, Tensor]) -> None:
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
    state.load_state_dict(layer.paged, {name: x for name, x in found.items() if not name.startswith("padding")})
    layer.slots = described["slots"]
    starts = described["paddings"]
    extra = {name for name in found if name.startswith("padding")} - {f"padding{at}" for at in range(len(starts))}
    if not isinstance(layer.slots, int) or not isinstance(starts, list) or extra:
        raise ValueError(f"a layer cannot have {layer.slots!r} slots with padding from {starts!r} on")
    for at, start in enumerate(starts):
        is_token = found[f"padding{at}"]
        fits = is_token.dtype == torch.bool and is_token.ndim == 2 and len(is_token) == batch and isinstance(start, int)
        if not fits or not 0 <= start <= layer.slots - is_token.shape[1]:
            shape = f"{list(is_token.shape)} {is_token.dtype}"
            raise ValueError(f"padding of {batch} sequences from slot {start!r} of {layer.slots} on cannot be {shape}")
        layer.paddings.append(Padding(start, is_token, is_token.sum(1).tolist()))
