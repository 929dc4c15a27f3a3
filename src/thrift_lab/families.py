"""Decoder families of transformers as tiny random models: what the table of models (`thrift_lab.model_table`) is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 128
WINDOW = 48

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_INDEX = {"index_topk": 32, "index_n_heads": 2, "index_head_dim": 32}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


@dataclass(frozen=True)
class Family:
    """A family as a tiny model.

    Args:
        kind: ``model_type`` of transformers.
        options: what its configuration needs beyond the sizes of all.
        variant: what sets it apart from the family's other rows.
        drop: sizes that its configuration does not take.
        special: whether its attention is more than causal attention over all tokens, so that it is checked in every run.
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    drop: tuple[str, ...] = ()
    special: bool = False

    @property
    def name(self) -> str:
        """The name of its row."""
        return f"{self.kind}, {self.variant}" if self.variant else self.kind

    def sizes(self) -> dict[str, Any]:
        """The options of its configuration."""
        return {name: value for name, value in {**_SIZES, **self.options}.items() if name not in self.drop}


def _plain(*kinds: str) -> list[Family]:
    return [Family(kind, dict(_EXPERTS) if "moe" in kind else {}) for kind in kinds]


FAMILIES: tuple[Family, ...] = (
    # Causal attention over all tokens.
    *_plain(
        "llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "phi", "phi3", "phimoe", "stablelm", "starcoder2"
    ),
    Family("mixtral", _EXPERTS),
    *_plain(
        "olmo", "olmo2", "olmoe", "cohere", "granite", "granitemoe", "glm", "glm4", "glm4_moe", "smollm3", "ernie4_5"
    ),
    *_plain(
        "ernie4_5_moe", "hunyuan_v1_dense", "seed_oss", "apertus", "arcee", "nemotron", "persimmon", "helium", "jetmoe"
    ),
    Family("minimax_m2", _EXPERTS),
    Family("ministral3"),
    Family("dots1", {**_EXPERTS, "sliding_window": None}),
    Family(
        "dbrx",
        {
            **_ROPE,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 64},
        },
    ),
    Family("gpt2"),
    Family("gpt_neox"),
    Family("gpt_bigcode"),
    Family("opt", {"word_embed_proj_dim": 64, "ffn_dim": 96}),
    Family("falcon", drop=("head_dim",)),
    # Attention of their own, positions in the logits.
    Family("gptj", {"rotary_dim": 8}, special=True),
    Family("codegen", {"rotary_dim": 8}),
    Family(
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": WINDOW},
        drop=("num_hidden_layers",),
    ),
    Family("bloom"),
    Family("mpt", special=True),
    # Sliding windows, sinks, softcaps, chunks.
    Family("mistral", {"sliding_window": None}),
    Family("mistral", {"sliding_window": WINDOW}, "window", special=True),
    Family("qwen2", {**_SLIDING, "use_sliding_window": True}, "window"),
    Family("ministral", _SLIDING, special=True),
    Family("gemma2", {**_SLIDING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0}, special=True),
    Family("gemma3_text", {**_SLIDING, "query_pre_attn_scalar": 8}, special=True),
    Family("olmo3", _SLIDING),
    Family("cohere2", _SLIDING),
    Family("exaone4", _SLIDING),
    Family("gpt_oss", {**_EXPERTS, **_SLIDING, **_ROPE}, special=True),
    Family("mimo_v2_flash", {**_EXPERTS, "sliding_window": WINDOW, "v_head_dim": 16}),
    Family(
        "llama4_text",
        {
            **_EXPERTS,
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 64,
            "intermediate_size_mlp": 96,
        },
        special=True,
    ),
    # Head dims that differ, K and V that layers share, that a model changes, or that are compressed.
    Family(
        "gemma3n_text",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 6,
        },
        special=True,
    ),
    Family(
        "gemma4_text",
        {
            **_SLIDING,
            **{"global_head_dim": 32, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
        },
        special=True,
    ),
    Family(
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "global_head_dim": 512,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
        "head dim 512, shared K and V",
        special=True,
    ),
    Family("doge", special=True),
    Family("diffllama", special=True),
    Family("deepseek_v2", _LATENT),
    Family("deepseek_v3", _LATENT, special=True),
    Family("deepseek_v32", {**_LATENT, **_INDEX}, special=True),
    Family("longcat_flash", _LATENT),
    # Hybrids.
    Family("qwen3_next", {**_EXPERTS, **_LINEAR}, special=True),
    Family("qwen3_5_text", _LINEAR),
    Family("olmo_hybrid", _LINEAR),
    Family("minimax", {**_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 32}),
    Family(
        "jamba",
        {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        special=True,
    ),
    Family("bamba", {**_MAMBA, "attn_layer_indices": [1]}, special=True),
    Family(
        "granitemoehybrid",
        {**_EXPERTS, **_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    ),
    Family("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, special=True),
    Family("falcon_h1", {**_MAMBA, "mamba_d_ssm": 128}, special=True),
    Family(
        "nemotron_h",
        {
            **_EXPERTS,
            "layers_block_type": ["mamba", "attention", "moe", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 32,
        },
        drop=("num_hidden_layers",),
        special=True,
    ),
    Family(
        "zamba2",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_hidden_layers": 4,
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "chunk_size": 16,
            "adapter_rank": 8,
        },
        drop=("head_dim", "num_key_value_heads"),
    ),
    Family(
        "recurrent_gemma",
        {"num_hidden_layers": 2, "block_types": ("recurrent", "attention"), "attention_window_size": WINDOW},
    ),
)
"""The rows of the table, the special ones among them checked in every run of the tests."""
