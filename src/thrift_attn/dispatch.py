"""What runs on which device: natively, compiled but not timed, emulated, or not at all, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from thrift_attn.config import Backend, BaseFormat, Compute, ThriftConfig, check_choice
from thrift_attn.crossovers import CROSSOVERS, EVERYWHERE, QUERIES, is_exact, measured
from thrift_attn.exact import Call, exact_server, why_not_exact
from thrift_attn.numerics import PrefillNumerics, describe_ignored

Status = Literal["native", "compiled", "emulated", "no"]
"""Compiled: native, but never run or timed on such a GPU."""

Form = Literal["decoded", "native"]
"""How packed low-precision data are multiplied: as decoded 16-bit numbers, or by units of their own format."""

AUTO_FORMATS: dict[str, BaseFormat] = {"8.9": "fp8", "9.0": "fp8", "10": "nvfp4", "12": "nvfp4"}
"""What ``base_format="auto"`` is by compute capability, or its major number: what has units. Other GPUs attend exactly."""


class Served(NamedTuple):
    """What runs for a call of `thrift_attn.attention`.

    Args:
        by: the reference, the kernels of thrift, or a kernel for exact attention (`thrift_attn.exact`).
        form: how the kernels of thrift multiply.
        config: what is computed, with a format and an ``exact_below`` that are named: what records store.
        why: why it is exact, for people; empty otherwise.
    """

    by: Literal["reference", "triton", "exact"]
    form: Form
    config: ThriftConfig
    why: str = ""


class Row(NamedTuple):
    """One line of the support table."""

    feature: str
    status: Status
    why: str


def support(device: torch.device | str | None = None) -> list[Row]:
    """Support table of a device.

    Args:
        device: a torch device; by default the first CUDA device if there is one, else the CPU.

    Returns:
        One row per feature of the library.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = [*_auto_rows(device), *_prefill_rows(device)]
    try:
        backend = check_cache(ThriftConfig.for_cache(), 128, torch.bfloat16, device)
    except NotImplementedError as error:
        return [*rows, Row("PagedThriftCache", "no", str(error))]
    if backend == "reference":
        return [*rows, Row("PagedThriftCache", "emulated", "pages are written and read in plain PyTorch")]
    dims = ", ".join(map(str, HEAD_DIMS))
    timed = "timed" if torch.cuda.get_device_capability(device) == (9, 0) else "compiled for this GPU, not timed on one"
    return [
        *rows,
        Row("PagedThriftCache, base_format='nvfp4' | 'mxfp4'", "native", f"kernels for head_dim {dims}; {timed}"),
    ]


def _auto_rows(device: torch.device) -> list[Row]:
    """What ``base_format="auto"`` means on a device, and from which length on."""
    prompt = Call(device=device, dtype=torch.bfloat16, head_dim=128, queries=MAX_KEYS, keys=MAX_KEYS)
    config = prefill_config(ThriftConfig(), prompt)
    feature = "attention(), base_format='auto', the default"
    if config.exact_below == EVERYWHERE:
        return [Row(feature, "native", f"exact 16-bit attention by {exact_server(prompt)}: no FP8 or FP4 units here")]
    if device.type != "cuda":
        return [Row(feature, "emulated", f"{config.base_format} with compute={config.compute!r}: quality, no speed")]
    told = describe_ignored(config, PrefillNumerics.resolve(config))
    means = f"{config.base_format}" + (f"; {'; '.join(told)}" if told else "")
    rows = [Row(feature, "native", means)]
    capability = torch.cuda.get_device_capability(device)
    for one in CROSSOVERS:
        if one.capability == capability:
            shorter = f"the same, fewer than {one.keys:,} keys, head_dim {one.head_dim}, with {one.server}"
            rows.append(Row(shorter, "native", f"exact 16-bit attention, which is faster: {one.source}"))
    if len(rows) == 1:
        rows.append(
            Row("the same, short prompts", "native", "not dispatched: no crossover has been measured on this GPU")
        )
    return rows


def _prefill_rows(device: torch.device) -> list[Row]:
    """What `thrift_attn.attention` runs on a device."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    plain = f"plain PyTorch on {where}: every value exact to the format's definition, no speed gained"
    rows = [Row("attention(), any option, backend='reference'", "emulated", plain)]
    dims = ", ".join(map(str, HEAD_DIMS))
    kinds: tuple[tuple[BaseFormat, Compute], ...] = (
        ("nvfp4", "fp4"),
        ("mxfp4", "fp4"),
        ("fp8", "fp4"),
        ("nvfp4", "16bit"),
    )
    for low, math in kinds:
        feature = f"attention(), base_format={low!r}, compute={math!r}, backend='triton'"
        config = ThriftConfig(base_format=low, compute=math)
        told = describe_ignored(config, PrefillNumerics.resolve(config))
        if told:
            rows.append(Row(f"options with base_format={low!r}, compute={math!r}", "no", "; ".join(told)))
        try:
            form = check_prefill(config, 128, torch.bfloat16, device)
        except NotImplementedError as error:
            rows.append(Row(feature, "no", str(error)))
            continue
        timed = torch.cuda.get_device_capability(device) == (9, 0)
        if low == "fp8":
            lacking = sm90_fp8_toolchain(device)
            dims_fp8 = ", ".join(map(str, SM90_FP8_HEAD_DIMS))
            own = Row(
                "the FP8 kernel of sm_90", "native", f"head_dim {dims_fp8}, batches of one length, timed on this GPU"
            )
            rows.append(
                own if lacking is None else Row(own.feature, "no", f"{lacking}; fp8 runs on the kernel of every GPU")
            )
        if form == "native":
            status, why = (
                ("native", "timed on this GPU") if timed else ("compiled", "compiled for this GPU, not timed on one")
            )
            rows.append(Row(feature, status, f"{low} products in hardware, head_dim {dims}; {why}"))
        elif math == "16bit":
            why = "decoded to 16 bits once, head_dim " + dims
            rows.append(Row(feature, "native" if timed else "compiled", why))
        else:
            rows.append(
                Row(feature, "emulated", f"the same numbers in 16-bit products: no {low} units; head_dim {dims}")
            )
    return rows


HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head dimensions the kernels are built and tested for."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch, compute capability 9 and up)."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def prefill_config(config: ThriftConfig, call: Call, backend: str = "auto") -> ThriftConfig:
    """What a configuration means for a call of `thrift_attn.attention`: with a format and an ``exact_below`` that are named.

    Args:
        config: as it was given.
        call: its facts; no data and no batch.
        backend: as it was asked for: one that is named runs at every length.
    """
    if config.base_format != "auto":
        return config if config.exact_below is not None else _named(config, config.base_format, 0)
    chosen, below = _auto_format(config, call), config.exact_below
    if below is None and chosen == "exact":
        below = EVERYWHERE
    elif below is None and backend == "auto" and call.device.type == "cuda" and _dispatched(config, call):
        below = measured(torch.cuda.get_device_capability(call.device), chosen, call.head_dim, exact_server(call))
    return _named(config, "nvfp4" if chosen == "exact" else chosen, below or 0)


@lru_cache(maxsize=64)
def _named(config: ThriftConfig, base_format: BaseFormat, exact_below: int | None) -> ThriftConfig:
    """Return a configuration with these two, made and checked once: a call of attention makes none."""
    return config.with_(base_format=base_format, exact_below=exact_below)


def cache_config(config: ThriftConfig) -> ThriftConfig:
    """What a configuration means for a cache: pages hold nvfp4 on every device, and nothing is dispatched."""
    return _named(config, "nvfp4", config.exact_below) if config.base_format == "auto" else config


def _auto_format(config: ThriftConfig, call: Call) -> BaseFormat | Literal["exact"]:
    """The format that ``base_format="auto"`` is for a call, or exact attention."""
    if call.device.type != "cuda" or config.compute == "16bit" or config.promoted_storage != "16bit":
        return "nvfp4"
    if call.dtype not in (torch.float16, torch.bfloat16) or call.head_dim not in HEAD_DIMS:
        return "exact"  # no kernels of thrift
    major, minor = torch.cuda.get_device_capability(call.device)
    return AUTO_FORMATS.get(f"{major}.{minor}") or AUTO_FORMATS.get(str(major)) or "exact"


def _dispatched(config: ThriftConfig, call: Call) -> bool:
    """Whether what has been measured, causal prompts by kernels, speaks for a call, and exact attention can serve it."""
    plain = config.compute == "fp4" and config.promoted_storage == "16bit" and config.score == "mean"
    return plain and call.is_prompt_for(exact_server(call)) and why_not_exact(call) is None


def serve(asked: str, config: ThriftConfig, call: Call) -> Served:
    """What runs for a call of `thrift_attn.attention`: the one place where this is decided.

    Args:
        asked: the backend: ``"auto"``, ``"reference"`` or ``"triton"``.
        config: as it was given.
        call: its facts. Rows of a batch that have lengths of their own are calls of their own.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: a backend that was asked for and cannot serve the call, with the reason.
    """
    chosen = prefill_config(config, call, asked)
    below = chosen.exact_below or 0
    if asked == "auto" and is_exact(below, call.keys, call.queries) and why_not_exact(call) is None:
        return Served("exact", "decoded", chosen, _why_exact(below, call))
    by, form = pick_backend(
        asked, chosen, call.head_dim, call.dtype, call.device, call.keys, causal=call.causal, window=call.window
    )
    if by == "triton" and form == "decoded" and chosen.compute == "fp4" and chosen.base_format != "drop":
        _tell_emulated(chosen, call)
    return Served(by, form, chosen)


def _why_exact(below: int, call: Call) -> str:
    """Why a call is attended exactly, for reports."""
    if below == EVERYWHERE:
        return f"exact by {exact_server(call)}: no kernels or units for it on this GPU"
    few = f"fewer than {below:,} keys" if call.keys < below else f"fewer than {-(-below // QUERIES):,} queries"
    return f"exact by {exact_server(call)}: {few}"


_told: set[str] = set()


def _tell_emulated(config: ThriftConfig, call: Call) -> None:
    """Warn, once per format, that a GPU without units computes the numbers of a format and gains no speed."""
    if call.device.type != "cuda" or config.exact_below == EVERYWHERE or torch.compiler.is_compiling():
        return
    if config.base_format not in _told:
        _told.add(config.base_format)
        warnings.warn(
            f"thrift: base_format={config.base_format!r} is emulated on {torch.cuda.get_device_name(call.device)}, for its "
            f"quality and not its speed; base_format='auto' is what this GPU is fast at",
            stacklevel=4,
        )


def check_cache(
    config: ThriftConfig, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Literal["triton", "reference"]:
    """Backend of a paged cache: kernels on a CUDA device, plain PyTorch on a CPU.

    Raises:
        TypeError: an unsupported dtype.
        ValueError: a head dimension that pages cannot hold.
        NotImplementedError: a config, head dimension or device the cache does not serve, with the reason.
    """
    kernels = device.type == "cuda" or interpreted()
    if dtype not in (torch.float16, torch.bfloat16) and (kernels or dtype != torch.float32):
        held = "float32, " * (not kernels) + "float16 or bfloat16"
        raise TypeError(f"a cache on {device.type} holds {held}, got {dtype}")
    if head_dim < 16 or head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}")
    if config.compute != "16bit":
        raise NotImplementedError(
            f"the cache computes compute='16bit' (Q and P are not quantised), got compute={config.compute!r}"
        )
    if config.base_format not in ("nvfp4", "mxfp4"):
        raise NotImplementedError(
            f"the cache stores base_format='nvfp4' or 'mxfp4', got base_format={config.base_format!r}"
        )
    if config.base_format == "mxfp4" and head_dim % 32:
        raise ValueError(f"base_format='mxfp4' needs a head_dim that is a multiple of 32, got {head_dim}")
    if config.score != "mean":
        raise NotImplementedError(f"the cache scores blocks by score='mean', got score={config.score!r}")
    if not {"cpu": True, "cuda": torch.cuda.is_available()}.get(device.type):
        raise NotImplementedError(f"the cache runs on cpu and on cuda devices that torch finds, got {device.type}")
    if not kernels:
        return "reference"
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"the kernels serve head_dim {', '.join(map(str, HEAD_DIMS))}, got {head_dim}")
    if importlib.util.find_spec("triton") is None:
        raise NotImplementedError("the cache's kernels need triton: pip install 'thrift-attn[kernels]'")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise NotImplementedError("the cache's kernels need a GPU of compute capability 8.0 or newer")
    return "triton"


MAX_KEYS = 1 << 20
"""Most keys of one sequence that the prefill kernels choose blocks among."""


def check_prefill(
    config: ThriftConfig,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    keys: int = 1,
    *,
    causal: bool = True,
    window: int | None = None,
) -> Form:
    """How the prefill kernels would multiply on this device.

    Raises:
        NotImplementedError: a call they do not serve, with the reason.
    """
    if device.type != "cuda" and not interpreted():
        raise NotImplementedError(f"backend='triton' needs a CUDA device, got {device.type}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"backend='triton' takes float16 and bfloat16, got {dtype}")
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"backend='triton' serves head_dim {', '.join(map(str, HEAD_DIMS))}, got {head_dim}")
    if config.score != "mean":
        raise NotImplementedError(f"backend='triton' scores blocks by score='mean', got score={config.score!r}")
    if config.base_format == "fp8" and config.promoted_storage != "16bit":
        raise NotImplementedError(
            "backend='triton' with base_format='fp8' promotes to promoted_storage='16bit', "
            f"got promoted_storage={config.promoted_storage!r}"
        )
    if window is not None and not causal:
        raise NotImplementedError("backend='triton' serves a window with causal=True, got causal=False")
    if keys > MAX_KEYS:
        raise NotImplementedError(f"backend='triton' serves up to {MAX_KEYS} keys, got {keys}")
    if importlib.util.find_spec("triton") is None:
        raise NotImplementedError("backend='triton' needs triton: pip install 'thrift-attn[kernels]'")
    if interpreted():
        return "decoded"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise NotImplementedError("backend='triton' needs a GPU of compute capability 8.0 or newer")
    units = capability >= (8, 9) if config.base_format == "fp8" else capability[0] in (10, 12)
    return (
        "native"
        if units and config.compute == "fp4" and config.promoted_storage == "16bit" and config.base_format != "drop"
        else "decoded"
    )


SM90_FP8_HEAD_DIMS = (64, 128)
"""Head dims of the FP8 kernel of sm_90."""

SM90_FP8_TRITONS = ((3, 6), (3, 10))
"""Versions of Triton whose Gluon that kernel is written for: from the first, before the second. What Gluon renames between
versions is in `thrift_attn.prefill.sm90_fp8.gluon_versions`."""

_TMA_ALIGNMENT = 16


def sm90_fp8_toolchain(device: torch.device) -> str | None:
    """Why this GPU and this Triton cannot run the FP8 kernel of sm_90 (`thrift_attn.prefill.sm90_fp8`), or None."""
    if device.type != "cuda":
        return f"the FP8 kernel needs a CUDA device, got {device}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"the FP8 kernel needs compute capability 9.0, got {torch.cuda.get_device_capability(device)}"
    version = triton_version()
    first, after = SM90_FP8_TRITONS
    if version is None or not first <= tuple(int(n) for n in version.split(".")[:2]) < after:
        known = f"{first[0]}.{first[1]} to {after[0]}.{after[1] - 1}"
        return f"the FP8 kernel of sm_90 is written in the Gluon of Triton {known}, got Triton {version}"
    return None


def triton_version() -> str | None:
    """Version of the Triton that is loaded or would be, or None; does not import it."""
    if "triton" in sys.modules:
        return sys.modules["triton"].__version__
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def why_not_sm90_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float) -> str | None:
    """Why the FP8 kernel of sm_90 cannot serve a call with base_format='fp8', compute='fp4', or None.

    It serves batches of one length, longer than decode, without statistics: what packed sequences, ``kv_lengths`` and
    ``return_stats`` ask for runs on the kernel of every GPU.

    Args:
        q: ``[B, Hq, Tq, D]``.
        k: ``[B, Hkv, Tk, D]``.
        v: the shape of ``k``.
        causal: whether queries are right-aligned and see only keys up to their own position.
        scale: factor of the logits.
    """
    lacking = sm90_fp8_toolchain(q.device)
    if lacking is not None:
        return lacking
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the FP8 kernel takes float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] not in SM90_FP8_HEAD_DIMS:
        return f"the FP8 kernel serves head dims {SM90_FP8_HEAD_DIMS}, got {q.shape[-1]}"
    if causal and q.shape[2] > k.shape[2]:
        return f"the FP8 kernel needs Tq <= Tk when causal, got {q.shape[2]} and {k.shape[2]}"
    if not scale > 0:
        return f"the FP8 kernel needs a positive scale, got {scale}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        steps = list(zip(x.stride(), x.shape, strict=True))[:-1]
        aligned = all(n * x.element_size() % _TMA_ALIGNMENT == 0 and (n > 0 or size == 1) for n, size in steps)
        if x.stride(-1) != 1 or not aligned or x.data_ptr() % _TMA_ALIGNMENT:
            return f"the FP8 kernel needs {name} with contiguous rows on {_TMA_ALIGNMENT}-byte boundaries"
    return None


def pick_backend(
    asked: str,
    config: ThriftConfig,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    keys: int,
    *,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Literal["reference", "triton"], Form]:
    """Backend for a call of `thrift_attn.attention`: with ``"auto"`` the kernels on a CUDA device if they serve the call.

    Returns:
        The backend, and how it multiplies.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: a backend that was asked for and cannot serve the call, with the reason.
    """
    check_choice("backend", asked, Backend)
    if asked == "reference" or (asked == "auto" and device.type != "cuda"):
        return "reference", "decoded"
    try:
        return "triton", check_prefill(config, head_dim, dtype, device, keys, causal=causal, window=window)
    except NotImplementedError:
        if asked == "triton":
            raise
        return "reference", "decoded"
