"""What an attention layer of vLLM does with pages of thrift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionImpl

from thrift_attn.config import ThriftConfig
from thrift_attn.crossovers import EVERYWHERE
from thrift_attn.dispatch import cache_config, check_cache
from thrift_attn.interface import attend
from thrift_attn.numerics import DecodeNumerics
from thrift_attn.reference.paged_rows import SharedPages
from thrift_attn.vllm.engine_options import EngineOptions
from thrift_attn.vllm.engine_step import LayerOptions, StepRows, attend_step
from thrift_attn.vllm.page_record import PageRecord, PageViews
from thrift_attn.vllm.scale_files import LayerScales, measure
from thrift_attn.vllm.start_scales import scale_before_pages
from thrift_attn.vllm.tail_ring import SUFFIX, ThriftTail, hang_tails
from thrift_attn.vllm.unserved import check_layer, check_model

_log = init_logger("vllm.thrift_attn")

EXACT = ThriftConfig(exact_below=EVERYWHERE, budget=1.0)
"""What is computed while a model is calibrated."""


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
        ValueError: options that there are not.
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
        check_cache(stored, head_size, self._dtype, self.device)
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
        self._views: tuple[Tensor, PageViews] | None = None

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
        tail = self._tail_of(layer)
        rings = get_forward_context().attn_metadata[tail.layer_name].rings  # type: ignore[index]
        attend_step(
            query, key, value, output,
            rows=attn_metadata, rings=rings, layer=self._pages(kv_cache, tail), options=self._computes,
        )  # fmt: skip
        return output

    def _attend_without_pages(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """One prompt of all tokens, exactly, where someone looks; else there is nothing to compute."""
        if not self.calibrating:
            return output.zero_()
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        self.scales = measure(k[0], v[0], centred=self._computes.pages.centred)
        found = attend(q, k, v, config=EXACT, scale=self.scale, softcap=self._computes.softcap).out
        return output.copy_(found[0].transpose(0, 1))

    def _tail_of(self, layer: Any) -> ThriftTail:
        if self.tail is None:
            raise RuntimeError(f"{layer.layer_name} has no {layer.layer_name + SUFFIX}: its weights were never loaded")
        return self.tail

    def _pages(self, kv_cache: Tensor, tail: ThriftTail) -> SharedPages:
        """What the layer's sequences lie in. vLLM may bind other blocks after it has measured memory."""
        if self._views is None or self._views[0] is not kv_cache:
            self._views = kv_cache, self.record.pages(kv_cache.view(torch.uint8), self._dtype)
        if self.lacks_scales:
            raise RuntimeError(f"{tail.layer_name.removesuffix(SUFFIX)} was not calibrated before its first page")
        return SharedPages(*self._views[1], tail.rings, *(self.scales or (None, None)))
