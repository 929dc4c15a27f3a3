"""The decode kernels that people use today, one row of `BASELINES` each.

Every row gets the settings that its authors offer for decoding (splits, packing of the query heads of a KV head into rows,
memory layout); the fastest correct one counts, the others stay in the record. K and V are stored ``[B, T, Hkv, D]``, which
FlashAttention and FlashInfer read as it is; copies into another layout or precision are made outside the timing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thrift_attn.config import BLOCK
from thrift_lab.bench import flashinfer_build
from thrift_lab.bench.cases import DecodeCase, plain_bytes
from thrift_lab.bench.check import Rounding
from thrift_lab.bench.inputs import Inputs
from thrift_lab.bench.timing import Step
from thrift_lab.bench.variants import Absent, Method, Variant

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16


def import_module(name: str) -> ModuleType:
    """Import a module or raise Absent with the reason."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken binary raises OSError, RuntimeError and others
        raise Absent(f"import {name}: {type(error).__name__}: {error}") from error


def _one_token(case: DecodeCase) -> None:
    """These calls are written for one new token of each sequence."""
    if case.tq != 1:
        raise Absent(f"this benchmark calls it with one new token only, the case has {case.tq}")


def _as_fp8(tensors: list[Tensor]) -> list[Tensor]:
    """e4m3 copies with scale 1: the inputs lie well inside the format's range, so a scale changes nothing."""
    return [x.to(FP8) for x in tensors]


# --- torch: cuDNN and FlashAttention-2 -------------------------------------------------------------------------------


def _sdpa_variants(backend: str, case: DecodeCase) -> list[Variant]:
    """Queries of a group as heads or as rows, K and V as stored or as [B, Hkv, T, D]."""
    from torch.nn.attention import SDPBackend

    _one_token(case)
    which = getattr(SDPBackend, backend)
    return [
        Variant(f"{rows}, {layout}", partial(_sdpa, which, rows == "group as rows", layout == "[B, H, T, D]"))
        for layout in ("[B, T, H, D]", "[B, H, T, D]")
        for rows in (("group as rows", "group as heads") if case.group > 1 else ("group as rows",))
    ]


def _sdpa(backend: Any, packed: bool, copied: bool, inputs: Inputs) -> list[Step]:
    from torch.nn.attention import sdpa_kernel

    case = inputs.case

    def heads_first(x: Tensor) -> Tensor:
        x = x[:, : case.kv].transpose(1, 2)
        return x.contiguous() if copied else x

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            if packed:  # [B, Hkv, G, D]: without a mask the rows of a group see the same keys
                out = F.scaled_dot_product_attention(q.view(case.batch, case.kv_heads, case.group, -1), k, v)
                return out.reshape(q.shape)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    sets = zip(inputs.q, map(heads_first, inputs.k), map(heads_first, inputs.v), strict=True)
    return [partial(step, *tensors) for tensors in sets]


def _flash_attn_variants(case: DecodeCase) -> list[Variant]:
    _one_token(case)
    module = import_module("flash_attn")
    return [
        Variant(f"num_splits={splits or 'auto'}", partial(_flash_attn, module.flash_attn_with_kvcache, splits))
        for splits in (0, 8, 32)
    ]


def _flash_attn(call: Callable[..., Any], splits: int, inputs: Inputs) -> list[Step]:
    kv = inputs.case.kv

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q.transpose(1, 2), k[:, :kv], v[:, :kv], num_splits=splits).transpose(1, 2)

    return [partial(step, *tensors) for tensors in zip(inputs.q, inputs.k, inputs.v, strict=True)]


# --- FlashAttention-3 ------------------------------------------------------------------------------------------------


def fa3_module() -> ModuleType:
    """The package under either of its names: the forward-only wheel, or FlashAttention's own build."""
    try:
        return import_module("fa3_fwd_interface")
    except Absent as first:
        try:
            return import_module("flash_attn_interface")
        except Absent as second:
            raise Absent(f"{first}; {second}") from second


def _fa3_variants(fp8: bool, case: DecodeCase) -> list[Variant]:
    """Its own choice of splits and several fixed ones, packed query heads; with and without lengths on the device."""
    call = fa3_module().flash_attn_with_kvcache
    if torch.cuda.get_device_capability()[0] != 9:
        raise Absent("FlashAttention-3 needs compute capability 9.0")
    options: list[dict[str, Any]] = [{"num_splits": 0, "lengths": True}]
    options += [{"num_splits": splits} for splits in (0, 4, 8, 16, 32, 64)]
    options += [{"num_splits": splits, "pack_gqa": True} for splits in (0, 16)] if case.group > 1 else []
    return [
        Variant(", ".join(f"{key}={value}" for key, value in option.items()), partial(_fa3, call, fp8, option))
        for option in options
    ]


def _fa3(call: Callable[..., Any], fp8: bool, options: dict[str, Any], inputs: Inputs) -> list[Step]:
    case = inputs.case
    keywords = {key: value for key, value in options.items() if key != "lengths"}
    keywords["causal"] = case.tq > 1  # aligned to the last key, as the cache is
    if options.get("lengths"):
        keywords["cache_seqlens"] = torch.full((case.batch,), case.kv, dtype=torch.int32, device=inputs.q[0].device)
    q, k, v = ([x.to(FP8) if fp8 else x for x in tensors] for tensors in (inputs.q, inputs.k, inputs.v))

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = call(q.transpose(1, 2), k[:, : case.kv], v[:, : case.kv], softmax_scale=case.scale, **keywords)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return [partial(step, *tensors) for tensors in zip(q, k, v, strict=True)]


# --- FlashInfer ------------------------------------------------------------------------------------------------------


def _pages(tensors: list[Tensor], fp8: bool) -> list[Tensor]:
    """[pages, 64, Hkv, D] of each set, sequence after sequence."""
    return [x.view(-1, BLOCK, *x.shape[2:]) for x in (_as_fp8(tensors) if fp8 else tensors)]


def _flashinfer_variants(fp8: bool, case: DecodeCase) -> list[Variant]:
    """The wrapper on tensor cores; on CUDA cores as well where each KV head has one query head."""
    _one_token(case)
    module = import_module("flashinfer")
    found = []
    for tensor_cores in (True, False) if case.group == 1 else (True,):
        kind: flashinfer_build.Kind = "prefill" if tensor_cores else "decode"
        label = "tensor cores" if tensor_cores else "CUDA cores"
        build = partial(_flashinfer, module, fp8, tensor_cores)
        found.append(Variant(label, partial(_when_built, flashinfer_build.Spec.of(kind, case, fp8), build)))
    return found


def _when_built(spec: flashinfer_build.Spec, build: Callable[[Inputs], list[Step]], inputs: Inputs) -> list[Step]:
    """Run ``build`` if FlashInfer's module was compiled in time."""
    problem = flashinfer_build.problem(spec)
    if problem:
        raise Absent(problem)
    return build(inputs)


def _flashinfer(module: Any, fp8: bool, tensor_cores: bool, inputs: Inputs) -> list[Step]:
    case, device = inputs.case, inputs.q[0].device
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device=device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    starts = torch.arange(0, (case.batch + 1) * case.blocks, case.blocks, dtype=torch.int32)
    wrapper.plan(
        starts,
        torch.arange(case.batch * case.blocks, dtype=torch.int32, device=device),
        torch.full((case.batch,), case.kv - BLOCK * (case.blocks - 1), dtype=torch.int32),
        case.q_heads,
        case.kv_heads,
        case.head_dim,
        BLOCK,
        q_data_type=case.torch_dtype,
        kv_data_type=FP8 if fp8 else case.torch_dtype,
        sm_scale=case.scale,
        non_blocking=False,
    )

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return wrapper.run(q[:, :, 0], (k, v))[:, :, None]

    return [partial(step, *t) for t in zip(inputs.q, _pages(inputs.k, fp8), _pages(inputs.v, fp8), strict=True)]


def _xqa_variants(fp8: bool, case: DecodeCase) -> list[Variant]:
    """TensorRT-LLM's XQA kernel in FlashInfer, with and without programmatic dependent launch."""
    _one_token(case)
    call = import_module("flashinfer.decode").trtllm_batch_decode_with_kv_cache
    spec = flashinfer_build.Spec.of("xqa", case, fp8)
    return [Variant(f"pdl={pdl}", partial(_when_built, spec, partial(_xqa, call, fp8, pdl))) for pdl in (False, True)]


def _xqa(call: Callable[..., Any], fp8: bool, pdl: bool, inputs: Inputs) -> list[Step]:
    case, device = inputs.case, inputs.q[0].device
    workspace = torch.zeros(512 << 20, dtype=torch.uint8, device=device)  # its semaphores must start at zero
    table = torch.arange(case.batch * case.blocks, dtype=torch.int32, device=device).view(case.batch, -1)
    lengths = torch.full((case.batch,), case.kv, dtype=torch.int32, device=device)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = call(
            q[:, :, 0],
            (k, v),
            workspace,
            table,
            lengths,
            case.blocks * BLOCK,
            bmm1_scale=case.scale,
            bmm2_scale=1.0,
            kv_layout="NHD",
            enable_pdl=pdl,
            backend="xqa",
        )
        return out[:, :, None]

    return [partial(step, *t) for t in zip(inputs.q, _pages(inputs.k, fp8), _pages(inputs.v, fp8), strict=True)]


# --- the table -------------------------------------------------------------------------------------------------------


def _row(name: str, kind: Any, package: str, precision: str, computes: Rounding, variants: Any) -> Method:
    """A baseline: its bytes follow from the element size of its cache."""
    element = 2 if kind == "bf16" else 1
    return Method(
        name=name,
        kind=kind,
        package=package,
        precision=precision,
        computes=computes,
        bytes=lambda case: plain_bytes(case, element),
        bytes_per_token=lambda case: 2.0 * case.kv_heads * case.head_dim * element,
        variants=variants,
    )


_P16, _KV8, _ALL8 = Rounding(p=BF16), Rounding(kv=FP8, p=BF16), Rounding(kv=FP8, q=FP8, p=FP8)
_W16, _WKV8, _WALL8 = "16-bit Q, K, V", "16-bit Q, 8-bit K, V", "8-bit Q, K, V, P"

# fmt: off
BASELINES: tuple[Method, ...] = (
    #    name                         kind    package              precision  computes  settings
    _row("cuDNN SDPA",                "bf16", "torch",             _W16,   _P16,  partial(_sdpa_variants, "CUDNN_ATTENTION")),
    _row("FlashAttention-2 (torch)",  "bf16", "torch",             _W16,   _P16,  partial(_sdpa_variants, "FLASH_ATTENTION")),
    _row("FlashAttention-2",          "bf16", "flash_attn",        _W16,   _P16,  _flash_attn_variants),
    _row("FlashAttention-3",          "bf16", "fa3_fwd",           _W16,   _P16,  partial(_fa3_variants, False)),
    _row("FlashAttention-3 FP8",      "fp8",  "fa3_fwd",           _WALL8, _ALL8, partial(_fa3_variants, True)),
    _row("FlashInfer",                "bf16", "flashinfer-python", _W16,   _P16,  partial(_flashinfer_variants, False)),
    _row("FlashInfer FP8 KV",         "fp8",  "flashinfer-python", _WKV8,  _KV8,  partial(_flashinfer_variants, True)),
    _row("FlashInfer XQA",            "bf16", "flashinfer-python", _W16,   _P16,  partial(_xqa_variants, False)),
    _row("FlashInfer XQA FP8",        "fp8",  "flashinfer-python", _WALL8, _ALL8, partial(_xqa_variants, True)),
)
# fmt: on
