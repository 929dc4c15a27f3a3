"""What an attention layer of vLLM does with pages of thrift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionImpl

from thrift_attn.cache.tiles import attend_part
from thrift_attn.config import BLOCK
from thrift_attn.dispatch import cache_config, check_cache
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.paged_rows import SharedPages
from thrift_attn.vllm.engine_options import EngineOptions
from thrift_attn.vllm.engine_step import LayerOptions, StepPages, StepRows, attend_step, rehearse_prompts
from thrift_attn.vllm.page_record import PageRecord
from thrift_attn.vllm.plain_pages import PlainPages
from thrift_attn.vllm.scale_files import LayerScales, measure
from thrift_attn.vllm.start_scales import scale_before_pages
from thrift_attn.vllm.tail_ring import SUFFIX, ThriftTail, hang_tails
from thrift_attn.vllm.unserved import check_layer, check_model, check_reach

_log = init_logger("vllm.thrift_attn")


class ThriftImpl(AttentionImpl):
    """One attention layer.

    Args:
        num_heads: Hq of this rank.
        head_size: D.
        scale: factor of the logits.
        num_kv_heads: Hkv of this rank.
        alibi_slopes: not served.
        sliding_window: not served.
        kv_cache_dtype: ``"auto"``: what is stored is said by the options of thrift.
        logits_soft_cap: bound of the logits, or None.
        attn_type: decoders are served.
        kv_sharing_target_layer_name: not served.
        **extra: nothing else is served.

    Raises:
        NotImplementedError: what is not served, by name.
        ValueError: options that there are not, or more sequences or tokens than kernels serve.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ):
        asked = {
            "ALiBi": alibi_slopes,
            "a sliding window": sliding_window,
            "KV shared between layers": kv_sharing_target_layer_name,
            **extra,
        }
        check_layer(asked, attn_type, kv_cache_dtype)
        self._vllm_config = get_current_vllm_config()
        check_model(self._vllm_config)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.options = EngineOptions.read(self._vllm_config.additional_config)
        stored = cache_config(self.options.for_pages())
        self.device = torch.device(self._vllm_config.device_config.device)
        self._dtype = self._vllm_config.model_config.dtype
        self._by = check_cache(stored, head_size, self._dtype, self.device)
        if self._by == "triton":
            sequences, tokens = (
                self._vllm_config.scheduler_config.max_num_seqs,
                self._vllm_config.model_config.max_model_len,
            )
            check_reach(sequences, self.num_kv_heads, tokens)
        self.record = PageRecord(head_size, stored.promoted_storage)
        self._computes = LayerOptions(
            prompts=self.options.for_prompts(),
            pages=DecodeNumerics.resolve(stored),
            scale=scale,
            softcap=logits_soft_cap or None,
        )
        self.tail: ThriftTail | None = None
        self.scales: LayerScales | None = None
        self.calibrating = False
        self._budget: Tensor | None = None

    @property
    def lacks_scales(self) -> bool:
        """Whether pages are to be scaled and it is not known yet by what."""
        return self._computes.pages.channel_scales and self.scales is None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Prepare what must be there before pages are, for all layers of thrift.

        vLLM calls this of every attention layer when all layers are made and all weights are loaded, and before it asks what
        layers store: it is where a layer can be told its name, which an implementation does not learn.
        """
        context = self._vllm_config.compilation_config.static_forward_context
        layers = {name: one for name, one in context.items() if isinstance(getattr(one, "impl", None), ThriftImpl)}
        hang_tails(self._vllm_config, layers)
        if self._by == "triton":
            from thrift_attn.vllm.kernel_pages import step_budget

            self._budget = step_budget(self._computes, self._vllm_config.model_config.max_model_len, self.device)
        _log.info_once("%s", self._told())
        if self._computes.pages.channel_scales:
            scale_before_pages(self._vllm_config, layers, self.options)

    def _told(self) -> str:
        """What a server's log says of thrift."""
        stored, plain = self.record.token_bytes, 4 * self.head_size
        scales = "calibrated now" if self.options.scales is None else self.options.scales
        return (
            f"thrift: pages of {stored} bytes a token and KV head, {stored / plain:.1%} of 16 bits; "
            f"budget {self.options.budget}, sink_token {self.options.sink_token}, scales {scales}"
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepRows | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the K and V of a step into rings and pages, and attend.

        Args:
            layer: vLLM's attention layer.
            query: ``[tokens, Hq, D]``, padded behind the tokens of the step.
            key: ``[tokens, Hkv, D]``.
            value: likewise.
            kv_cache: uint8 ``[pages, Hkv, 64, token_bytes]``, or empty.
            attn_metadata: the sequences of the step; None while vLLM measures memory or the model is calibrated.
            output: ``[tokens, Hq, D]``, written.
            output_scale: not served.
            output_block_scale: not served.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("the thrift backend returns its output in 16 bits, not quantised")
        if attn_metadata is None:
            return self._attend_without_pages(query, key, value, output)
        if self.tail is None:
            raise RuntimeError(f"{layer.layer_name} has no {layer.layer_name + SUFFIX}: its weights were never loaded")
        rings = get_forward_context().attn_metadata[self.tail.layer_name].rings  # type: ignore[index]
        pages = self._pages(kv_cache, self.tail, attn_metadata, rings)
        attend_step(query, key, value, output, rows=attn_metadata, pages=pages, options=self._computes)
        return output

    def _attend_without_pages(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """One prompt of all tokens: exactly while the model is calibrated, else for the memory that it takes on a GPU."""
        if not self.calibrating:
            most = self._vllm_config.scheduler_config.max_num_batched_tokens
            if self._by == "triton" and len(query) >= most:  # not for each size of graphs
                self._rehearse(query, key, value, output)
            return output.zero_()
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        self.scales = measure(k[0], v[0], centred=self._computes.pages.centred)
        found, _ = attend_part(q, k, v, scale=self.scale, softcap=self._computes.softcap)
        return output.copy_(found[0].transpose(0, 1))

    def _rehearse(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Take the memory of the largest steps, of prompts and of decode."""
        from thrift_attn.vllm.kernel_pages import rehearse_decode

        assert self._budget is not None
        config = self._vllm_config
        block_tokens, sequences = config.cache_config.block_size, config.scheduler_config.max_num_seqs
        longest = self.record.step_tokens(block_tokens)
        prompts = max(1, min(sequences, len(query) // (longest + 1)))
        blocks = -(-config.model_config.max_model_len // BLOCK)
        rehearse_prompts(query, key, value, self._computes, prompts=prompts, blocks=blocks)
        for most in sorted({1, 1 + config.num_speculative_tokens, longest}):
            rehearse_decode(
                query, key, value, output, record=self.record, layer=self._computes, budget=self._budget,
                sequences=sequences, block_tokens=block_tokens, most=most,
            )  # fmt: skip

    def _pages(self, kv_cache: Tensor, tail: ThriftTail, rows: StepRows, rings: Tensor) -> StepPages:
        """What the sequences of a step lie in."""
        if self._by == "reference":
            return PlainPages(self._layer(kv_cache, tail), rows, rings, self._computes)
        from thrift_attn.vllm.kernel_pages import KernelPages

        return KernelPages(self._layer(kv_cache, tail), rows, rings, get_forward_context())

    def _layer(self, kv_cache: Tensor, tail: ThriftTail) -> Any:
        """What the layer's sequences lie in. It hangs on the tail: vLLM binds other blocks after it has measured memory."""
        if tail.pages is None:
            if self.lacks_scales:
                raise RuntimeError(f"{tail.layer_name.removesuffix(SUFFIX)} was not calibrated before its first page")
            views = self.record.pages(kv_cache.view(torch.uint8), self._dtype)
            layer: Any = SharedPages(*views, tail.rings, *(self.scales or (None, None)))
            if self._by == "triton":
                from thrift_attn.vllm.kernel_pages import KernelLayer

                assert self._budget is not None
                layer = KernelLayer(layer, self._computes, self._budget)
            tail.pages = layer
        return tail.pages
