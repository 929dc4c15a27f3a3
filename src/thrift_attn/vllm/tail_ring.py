"""The newest tokens of every sequence in 16 bits: a second group of blocks in vLLM's own pool, one block a sequence.

Beside each attention layer stands a layer that computes nothing. What it asks for is a block of the size of the pages, so
that both groups share one pool, nothing is padded, and prefix hits end at multiples of that size; vLLM gives it to a sequence
when it starts and takes it back when the sequence ends, is preempted or is aborted. A prefix hit needs no ring: it ends where a
block begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheLayout

from thrift_attn.config import BLOCK, DECODE_ROWS
from thrift_attn.vllm.page_record import PageRecord
from thrift_attn.vllm.unserved import PAGE_TOKENS

SUFFIX = ".thrift_tail"
"""Name of a tail behind that of its attention layer."""


@dataclass(frozen=True)
class RingRows:
    """int32 ``[B]``: the ring of each sequence of a step."""

    rings: Tensor


class TailBuilder(AttentionMetadataBuilder[RingRows]):  # type: ignore[type-var]
    """Hands on which block is whose ring."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Where a captured graph looks: block tables have a row for each sequence, kernels want the rings in one run.
        self._rings = torch.zeros(vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> RingRows:
        """Return the rings of a step."""
        table = common_attn_metadata.block_table_tensor
        rings = self._rings[: len(table)]
        rings.copy_(table[:, 0])
        return RingRows(rings)


class TailBackend(AttentionBackend):
    """Storage only."""

    @staticmethod
    def get_name() -> str:
        """Name in logs."""
        return "THRIFT_TAIL"

    @staticmethod
    def get_impl_cls() -> Any:
        """There is nothing to compute."""
        raise NotImplementedError("a tail is attended by the attention layer that it stands beside")

    @staticmethod
    def get_builder_cls() -> type[TailBuilder]:
        """What tells the rings of a step."""
        return TailBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """A ring is a whole block, and blocks are multiples of two pages: said here too, since vLLM looks for a size that suits
        all backends of a model."""
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Each head of a block in one run of bytes."""
        return (KVCacheLayout.LBHNC,)


class ThriftTail(AttentionLayerBase):
    """The rings of one attention layer.

    Args:
        layer_name: of the attention layer.
        kv_heads: Hkv, of this rank.
        record: of its pages, whose bytes a token and head are those of the rings as well.
        dtype: of K and V.
    """

    def __init__(self, layer_name: str, kv_heads: int, record: PageRecord, dtype: torch.dtype):
        self.layer_name = layer_name + SUFFIX
        self.kv_heads, self.record, self.dtype = kv_heads, record, dtype
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Storage only."""
        return TailBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> CircularBufferSpec:
        """One block of the size of the pages a sequence.

        Raises:
            ValueError: blocks too small for an incomplete block and the drafts of a step.
        """
        tokens, drafts = vllm_config.cache_config.block_size, vllm_config.num_speculative_tokens
        room = self.record.ring_tokens(tokens)
        if room < BLOCK + drafts:
            raise ValueError(
                f"thrift keeps {BLOCK} tokens and {drafts} drafts of each sequence in 16 bits, and a block of {tokens} tokens "
                f"has room for {room}: --block-size must be a larger multiple of 128"
            )
        if (
            drafts >= DECODE_ROWS
        ):  # more would be served as a part of a prompt, whose lengths the host does not know then
            raise ValueError(f"thrift decodes up to {DECODE_ROWS - 1} drafts in a step, got {drafts}")
        return CircularBufferSpec(
            block_size=tokens,
            num_kv_heads=self.kv_heads,
            head_size=self.record.head_dim,
            dtype=torch.uint8,
            state_content_bytes=self.record.token_bytes,
        )

    @property
    def kv_cache(self) -> Tensor:
        """The blocks that vLLM has allocated; empty before, and where it lets go of those that it has measured graphs with."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: Tensor) -> None:
        self._kv_cache = kv_cache
        self.rings = self.record.rings(kv_cache.view(torch.uint8), self.dtype) if len(kv_cache) else kv_cache
        self.pages: Any = None  # what the attention layer makes of its own blocks, which come and go with these


def hang_tails(vllm_config: Any, layers: dict[str, Any]) -> None:
    """Stand a tail beside each attention layer that has none.

    vLLM asks all layers of its forward context what they store, after the weights are loaded.

    Args:
        vllm_config: vLLM's own.
        layers: the attention layers of thrift by name.
    """
    context = vllm_config.compilation_config.static_forward_context
    for name, layer in layers.items():
        tail = ThriftTail(name, layer.num_kv_heads, layer.impl.record, vllm_config.model_config.dtype)
        if tail.layer_name not in context:
            context[tail.layer_name] = layer.impl.tail = tail
