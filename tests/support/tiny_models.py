"""Tiny random models of transformers and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import thrift_attn.transformers as thrift
import transformers
from thrift_attn import ThriftConfig, fraction

EXACT = ThriftConfig(budget=fraction(1.0))
WINDOW = 48
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
HEAD = {"head_dim": 16}
SPARSE_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    # name: config class, options, who serves layers 0 and 1
    "llama": ("LlamaConfig", HEAD, ("thrift", "thrift")),
    "qwen2": ("Qwen2Config", {}, ("thrift", "thrift")),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, **SPARSE_TYPES}, ("sdpa", "thrift")),
    "qwen3": ("Qwen3Config", HEAD, ("thrift", "thrift")),
    "mistral": ("MistralConfig", {**HEAD, "sliding_window": None}, ("thrift", "thrift")),
    "mistral-window": ("MistralConfig", {**HEAD, "sliding_window": WINDOW}, ("sdpa", "sdpa")),
    "gemma3": ("Gemma3TextConfig", {**HEAD, **SPARSE_TYPES, "query_pre_attn_scalar": 8}, ("sdpa", "thrift")),
    "gemma2": (
        "Gemma2Config",
        {**HEAD, **SPARSE_TYPES, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
        ("eager", "thrift"),
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            **HEAD,
            **SPARSE_TYPES,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        ("eager", "thrift"),
    ),
}


def build(family: str, dtype: torch.dtype = torch.float32, attn: str = "eager", **options: Any) -> Any:
    """A tiny random model in eval mode; the same weights for the same family."""
    name, extra, _ = FAMILIES[family]
    config = getattr(transformers, name)(**{**SHAPE, **extra, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attn).to(dtype).eval()
    for module in model.modules():
        if getattr(module, "sinks", None) is not None:
            nn.init.normal_(module.sinks)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and position ids of a batch of unequal lengths."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        span = slice(max(lengths) - length, None) if side == "left" else slice(0, length)
        ids[row, span] = tokens(1, length, seed=row)
        mask[row, span] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def chunked(model: Any, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of a prefill in chunks."""
    cache = transformers.DynamicCache(config=model.config)
    return torch.cat([model(x, past_key_values=cache, use_cache=True).logits for x in ids.split(sizes, dim=1)], 1)


def causal_module() -> nn.Module:
    """As little as an attention layer can be."""
    module = nn.Module()
    vars(module)["is_causal"] = True
    return module


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    """Largest difference in units of the largest value."""
    assert got.isfinite().all()
    assert float((got - want).abs().max() / want.abs().max()) < tolerance


def served(model: Any) -> list[str | None]:
    return [row.served_by for row in thrift.report(model)]
