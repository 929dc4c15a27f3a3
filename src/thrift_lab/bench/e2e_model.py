"""Whole models for `thrift bench e2e`: shapes with random weights, fused small operations, the BF16 attention to beat."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BF16 = "thrift_bench_bf16"
"""Name under which `bf16_attention` is known to transformers."""


@dataclass(frozen=True)
class Shape:
    """A model by its configuration.

    Args:
        config: configuration class of transformers.
        options: what differs from its defaults.
        reads: where the numbers come from.
    """

    config: str
    options: dict[str, Any]
    reads: str
    common: dict[str, Any] = field(
        default_factory=lambda: {"max_position_embeddings": 1 << 21, "tie_word_embeddings": False}
    )


SHAPES = {
    "llama-3.1-8b": Shape(
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        "arXiv 2407.21783, table 3",
    ),
    "qwen3-8b": Shape(
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
        "arXiv 2505.09388, table 1",
    ),
    "tiny": Shape(
        "LlamaConfig",
        {
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        "for tests",
    ),
}


def build(name: str, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> Any:
    """A model of `SHAPES` with random weights, made on the device, or one with its own weights from a folder or the hub.

    Raises:
        OSError: a name that is none of these.
    """
    import transformers

    if name not in SHAPES:
        own: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
        return own.eval().to(device)
    shape = SHAPES[name]
    config = getattr(transformers, shape.config)(**shape.common, **shape.options)
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def fuse(model: nn.Module) -> list[str]:
    """Let norms, rotary embeddings and gates run as one kernel each, on both sides of a comparison.

    transformers computes them in about a dozen small kernels, which on a GPU cost as much as a good part of the attention, and
    which users fuse with torch.compile.

    Returns:
        What was fused, in words.

    Raises:
        NotImplementedError: a device without Triton kernels.
    """
    if next(model.parameters()).device.type != "cuda":
        raise NotImplementedError("fused norms, rotary embeddings and gates are for CUDA devices: use --no-fused")
    from thrift_lab.bench import fused

    norms, gates = 0, 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            vars(module)["forward"] = partial(_rms_norm, fused.rms_norm, module)
            norms += 1
        elif hasattr(module, "gate_proj") and type(getattr(module, "act_fn", None)).__name__.startswith("SiLU"):
            vars(module)["forward"] = partial(_gated, fused.gated, module)
            gates += 1
    attention = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    code = sys.modules[type(attention).__module__]
    if not hasattr(code, "apply_rotary_pos_emb"):
        raise NotImplementedError(f"{code.__name__} has no apply_rotary_pos_emb")
    code.apply_rotary_pos_emb = fused.rotate  # type: ignore[attr-defined]
    return [f"{norms} RMS norms", f"{gates} gates (silu and product)", "rotary embeddings (in place)"]


def _rms_norm(norm: Any, module: Any, x: Tensor) -> Tensor:
    return norm(x, module.weight, module.variance_epsilon)


def _gated(gated: Any, module: Any, x: Tensor) -> Tensor:
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))


def register_bf16() -> None:
    """Make `bf16_attention` known to transformers as `BF16`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(BF16, bf16_attention)
    AttentionMaskInterface.register(BF16, lambda **kwargs: None)


def bf16_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The fastest 16-bit attention that PyTorch has, over a static cache: cuDNN, else FlashAttention, without a mask.

    One new token reads all slots of the cache, also the few that are not written yet: the time is that of a full cache,
    which is what is measured. A prompt starts an empty cache.

    Args:
        module: the attention layer.
        query: ``[B, Hq, T, D]``.
        key: ``[B, Hkv, S, D]``, the slots of the cache.
        value: likewise.
        attention_mask: None.
        scaling: of the logits.
        **kwargs: what other implementations need.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    new = query.shape[2]
    if new > 1:
        key, value = key[:, :, :new], value[:, :, :new]
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=new > 1, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
        )
    return out.transpose(1, 2).contiguous(), None
