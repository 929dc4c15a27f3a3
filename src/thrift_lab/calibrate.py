"""``thrift calibrate``: the powers of two that an engine packs a model's pages with, from a text of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from thrift_attn.transformers.versions import cache_keyword
from thrift_attn.vllm.scale_files import LayerScales, measure, write_scales
from thrift_lab.console import Log, silent
from thrift_lab.eval.texts import load_text
from thrift_lab.models import Loaded

SHORTEST = 128
"""Tokens of the least text: two blocks, of which the first is left aside."""


@torch.inference_mode()
def calibrate(loaded: Loaded, text: str, tokens: int, log: Log = silent) -> dict[int, LayerScales]:
    """Let a model read a text and take the scales of each attention layer from its K and V.

    Args:
        loaded: the model.
        text: a name or a file, as of `thrift_lab.eval.texts.load_text`.
        tokens: of the text that are read.
        log: called with a line when something slow starts.

    Returns:
        Scales by the number of a layer in its model; layers without K and V have none.

    Raises:
        ValueError: a text of fewer than 128 tokens.
    """
    from transformers import DynamicCache

    content = load_text(text, 8 * tokens, log).content
    ids = loaded.tokenizer(content[: 16 * tokens], return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < SHORTEST:
        raise ValueError(f"calibration takes at least {SHORTEST} tokens, got {ids.shape[1]} of {text!r}")
    log(f"reading {ids.shape[1]:,} tokens")
    model = loaded.model
    cache: Any = DynamicCache(config=model.config)
    model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    held = {number: (getattr(layer, "keys", None), layer) for number, layer in enumerate(cache.layers)}
    return {n: measure(k[0], layer.values[0], centred=True) for n, (k, layer) in held.items() if k is not None}


def write(loaded: Loaded, scales: dict[int, LayerScales], text: str, path: Path) -> str:
    """Write the file and say in a line what it holds.

    Args:
        loaded: the model.
        scales: of its layers.
        text: that was read.
        path: of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_scales(
        path, {n: LayerScales(*(x.cpu() for x in one)) for n, one in scales.items()}, model=loaded.spec, text=text
    )
    exponents = torch.cat([one.k_channel_scale.log2().flatten() for one in scales.values()])
    low, high = (int(x) for x in exponents.aminmax())
    return f"{len(scales)} layers, channels of K times 2^{low} to 2^{high}; wrote {path}"
