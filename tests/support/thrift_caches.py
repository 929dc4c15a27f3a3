"""Models with ThriftCache beside the same with eager attention."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import thrift_attn.transformers as thrift
from support.tiny_models import build, close
from thrift_attn import fraction
from thrift_attn.config import ThriftConfig

EXACT = ThriftConfig.for_cache(budget=fraction(1.0), promoted_storage="16bit")
"""Everything from the copy in the dtype of the model: exact attention by the code of the cache."""


def enabled(family: str = "llama", **options: Any) -> tuple[Any, Any]:
    """A tiny model with eager attention, and the same one with thrift."""
    plain = build(family, **options)
    model = copy.deepcopy(plain)
    thrift.enable(model)
    return plain, model


def cache_for(model: Any, max_tokens: int = 512, **options: Any) -> Any:
    return thrift.ThriftCache(model.config, max_tokens, **{"decode": EXACT, **options})


def stored(cache: Any) -> Any:
    """The pages of the first paged layer."""
    return cache.paged_layers[0].paged


def greedy(model: Any, ids: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(ids, output_logits=True, **options)


def same(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    assert torch.equal(got.sequences, want.sequences)
    close(torch.stack(got.logits), torch.stack(want.logits), tolerance)
