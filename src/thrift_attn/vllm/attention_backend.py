"""The backend that vLLM is told of, and what it makes of a batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from thrift_attn.config import BLOCK
from thrift_attn.vllm.attention_impl import ThriftImpl
from thrift_attn.vllm.engine_step import PromptRow, StepRows
from thrift_attn.vllm.page_record import PageRecord
from thrift_attn.vllm.unserved import PAGE_TOKENS
from thrift_attn.vllm.vllm_versions import host_lengths


class ThriftBuilder(AttentionMetadataBuilder[StepRows]):  # type: ignore[type-var]
    """Tells the layers which sequences a step has. Nothing is copied from the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        block_tokens = vllm_config.cache_config.block_size
        self._decodes = PageRecord(kv_cache_spec.head_size).step_tokens(block_tokens)  # those that decode come first
        self._init_reorder_batch_threshold(self._decodes)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepRows:
        """Return the sequences of a step."""
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("the thrift backend serves causal attention")
        decoding, prompts, *_ = split_decodes_and_prefills(common, decode_threshold=self._decodes)
        most, rows = common.max_query_len, []
        if prompts:
            starts, lengths = common.query_start_loc_cpu.tolist(), host_lengths(common)
            counts = [end - start for start, end in pairwise(starts)]
            most = max(counts[:decoding], default=0)
            rows = [
                PromptRow(row, starts[row], counts[row], lengths[row] - counts[row])
                for row in range(decoding, decoding + prompts)
                if counts[row]
            ]
        return StepRows(
            starts=common.query_start_loc,
            lengths=common.seq_lens,
            page_table=common.block_table_tensor,
            decoding=decoding,
            most=most,
            prompts=rows,
        )


class ThriftBackend(AttentionBackend):
    """Pages of thrift for full causal attention, ``--attention-backend CUSTOM``."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's list of backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[ThriftImpl]:
        """What a layer does."""
        return ThriftImpl

    @staticmethod
    def get_builder_cls() -> type[ThriftBuilder]:
        """What a step is made into."""
        return ThriftBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Pages; vLLM's blocks are several of them."""
        return [BLOCK]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Two pages: in the same bytes a ring has room for 64 tokens and some drafts."""
        return PAGE_TOKENS

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Multiples of 128."""
        return block_size is None or block_size % PAGE_TOKENS == 0

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 16; kernels ask for more (`thrift_attn.dispatch.check_cache`)."""
        return head_size % 16 == 0

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Not tried."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Which tokens are whose is planned on the host where prompts are among them."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Each page of a layer in one run of bytes, each head of it as well."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Say how many bytes pages take.

        Raises:
            ValueError: V of another width than K.
        """
        if not isinstance(spec, FullAttentionSpec) or spec.state_content_bytes is not None:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(f"pages hold K and V of one width, got {spec.head_size} and {spec.head_size_v}")
        return replace(spec, state_content_bytes=PageRecord(spec.head_size).token_bytes, dtype=torch.uint8)


class ThriftCPUBackend(ThriftBackend):
    """The same under the name that vLLM's attention has on a CPU."""

    @staticmethod
    def get_name() -> str:
        """vLLM takes no other name there."""
        return "CPU_ATTN"
