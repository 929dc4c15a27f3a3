"""What of an engine's models and features the thrift backend refuses, by name."""

from __future__ import annotations

from typing import Any

from thrift_attn.config import BLOCK
from thrift_attn.decode.tensors import check_sizes

PAGE_TOKENS = 128
"""Blocks of the engine are multiples of this: two pages, of which one holds a ring of 64 tokens and some drafts."""


def check_layer(asked: dict[str, Any], attn_type: str, kv_cache_dtype: str) -> None:
    """Refuse a layer that is not served.

    Args:
        asked: what a layer asks for by name, None where it does not.
        attn_type: the kind of attention.
        kv_cache_dtype: how the engine was told to store K and V.

    Raises:
        NotImplementedError: what is not served.
    """
    found = [name for name, value in asked.items() if value is not None]
    if attn_type != "decoder":
        found.append(f"attention of an {attn_type}")
    if kv_cache_dtype not in ("auto", "bfloat16", "float16"):
        found.append(f"--kv-cache-dtype {kv_cache_dtype}")
    if found:
        raise NotImplementedError(
            f"the thrift backend does not serve {', '.join(found)}. Layers of another kind can have another backend: "
            '--attention-config \'{"backend_per_kind": {"full_attention": "CUSTOM"}}\''
        )


def check_model(vllm_config: Any) -> None:
    """Refuse what an engine is asked for as a whole.

    Args:
        vllm_config: vLLM's own.

    Raises:
        NotImplementedError: what is not served.
        ValueError: a block size that is no multiple of 128.
    """
    parallel, found = vllm_config.parallel_config, []
    if parallel.decode_context_parallel_size > 1:
        found.append("decode context parallelism")
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        found.append("prefill context parallelism")
    if vllm_config.kv_transfer_config is not None:
        found.append("KV connectors, which have not been tried")
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.parallel_drafting:
        found.append("parallel drafting, which attends to tokens that are not there yet")
    if found:
        raise NotImplementedError(f"the thrift backend does not serve {', '.join(found)}")
    cache = vllm_config.cache_config
    if cache is not None and cache.user_specified_block_size and cache.block_size % PAGE_TOKENS:
        raise ValueError(
            f"the thrift backend needs a --block-size that is a multiple of {PAGE_TOKENS}, got {cache.block_size}"
        )


def check_reach(sequences: int, kv_heads: int, tokens: int) -> None:
    """Refuse what the kernels of decode cannot do in a step, when the engine starts rather than at its first step.

    Args:
        sequences: most of a step.
        kv_heads: Hkv of a rank.
        tokens: most of a sequence.

    Raises:
        ValueError: more sequences times KV heads, or more tokens.
    """
    try:
        check_sizes(sequences, kv_heads, -(-tokens // BLOCK))
    except ValueError as error:
        raise ValueError(f"{error}: --max-num-seqs or --max-model-len must be smaller") from error
