"""The powers of two that K and V are packed with, one set a layer, there before the first page and never changed after.

Pages are shared and live as long as the engine, so their scales cannot come from whoever came first. Either a file has them
(``thrift calibrate MODEL``), or they are taken when the engine starts: the model reads fixed token ids with its real weights,
and each layer measures its K and V. That is the same at every start, and each rank measures the heads that it has.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from thrift_attn.vllm.engine_options import EngineOptions
from thrift_attn.vllm.scale_files import LayerScales, read_scales
from thrift_attn.vllm.vllm_versions import without_adapters

TOKENS = 2048
"""Tokens that are read when an engine starts."""


_FILE = "name a file in the option 'scales' (thrift calibrate MODEL writes one)"


def fixed_ids(count: int, vocabulary: int) -> Tensor:
    """Token ids that an engine reads when it starts: spread over the vocabulary, the same everywhere. int64 ``[count]``."""
    return torch.arange(1, count + 1) * 2654435761 % 2**32 % vocabulary  # Knuth's multiplicative hash


def scale_before_pages(vllm_config: Any, layers: dict[str, Any], options: EngineOptions) -> None:
    """Give scales to the layers of a model, now or as soon as it can be run.

    Args:
        vllm_config: vLLM's own.
        layers: the attention layers of thrift by name.
        options: which name a file, or do not.

    Raises:
        NotImplementedError: no file, and a model of which each rank has some layers only, or with layers of other backends.
    """
    lacking = {name: one for name, one in layers.items() if one.impl.lacks_scales}
    if options.scales is not None:
        if lacking:
            _read_for(vllm_config, lacking, options.scales)
        return
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise NotImplementedError(f"with pipeline parallelism no rank can run the model to calibrate it: {_FILE}")
    context = vllm_config.compilation_config.static_forward_context
    others = [name for name, one in context.items() if hasattr(one, "impl") and name not in layers]
    if others:  # which answer with zeros where there are no pages, so that layers behind them would see nonsense
        raise NotImplementedError(
            f"{others[0]} has another backend, which cannot run while a model is calibrated: {_FILE}"
        )
    _calibrate_in_time()


def _read_for(vllm_config: Any, layers: dict[str, Any], path: str) -> None:
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.models.utils import extract_layer_index

    number = {name: extract_layer_index(name) for name in layers}
    if len(set(number.values())) < len(number):
        raise NotImplementedError(
            f"a file of scales is of one model, and {', '.join(layers)} are of two: the option 'scales' must be \"ones\""
        )
    wanted = {number[name]: (one.num_kv_heads, one.head_size) for name, one in layers.items()}
    ranks = vllm_config.parallel_config.tensor_parallel_size
    found = read_scales(path, wanted, rank=get_tensor_model_parallel_rank(), ranks=ranks)
    for name, layer in layers.items():
        layer.impl.scales = LayerScales(*(x.to(layer.impl.device) for x in found[number[name]]))


def _calibrate_in_time() -> None:
    """Have workers of this process calibrate their model when they are first asked what its layers store.

    That is the one point that every kind of worker passes on all ranks together, when the weights are there, whatever loaded
    them, and neither memory has been measured nor a page been written. The run that measures memory is too late for its
    result to count, may be left out, and reads nothing but zeros; the first step with pages comes when the first
    request has come. No plugin is called there, so the method of the worker is wrapped, in processes whose model chose thrift.
    """
    from vllm.v1.worker.gpu_worker import Worker  # also the base of workers on a CPU

    original = Worker.get_kv_cache_spec
    if getattr(original, "calibrates", False):
        return

    @functools.wraps(original)
    def get_kv_cache_spec(worker: Any) -> Any:
        calibrate(worker.model_runner, worker.vllm_config, worker.device)
        return original(worker)

    get_kv_cache_spec.calibrates = True
    Worker.get_kv_cache_spec = get_kv_cache_spec


@torch.inference_mode()
def calibrate(runner: Any, vllm_config: Any, device: torch.device) -> None:
    """Let a model read fixed token ids, and take the scales of layers of thrift that have none from their K and V.

    Adapters are left out: their requests have the scales of their base, as pages have one set.

    Args:
        runner: vLLM's model runner, with a model and its weights.
        vllm_config: vLLM's own.
        device: of the model.
    """
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    config = vllm_config.model_config
    context = vllm_config.compilation_config.static_forward_context
    impls = {
        name: one.impl for name, one in context.items() if getattr(getattr(one, "impl", None), "lacks_scales", False)
    }
    if not impls:
        return
    count = min(TOKENS, config.max_model_len, vllm_config.scheduler_config.max_num_batched_tokens)
    positions = torch.arange(count, device=device)
    if config.uses_mrope:
        positions = positions.expand(3, -1)
    without_adapters(runner, count)
    for impl in impls.values():
        impl.calibrating = True
    try:
        with set_current_vllm_config(vllm_config), set_forward_context(None, vllm_config, count, skip_compiled=True):
            runner.get_model()(
                input_ids=fixed_ids(count, config.get_vocab_size()).to(device),
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
    finally:
        for impl in impls.values():
            impl.calibrating = False
    if lacking := [name for name, impl in impls.items() if impl.lacks_scales]:
        raise RuntimeError(f'{", ".join(lacking)} did not run when the model was calibrated: {_FILE}, or "ones"')
