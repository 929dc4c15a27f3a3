"""Which kernels the library starts, and how: its own launchers are called, and what they would start is written down instead.

So the list of kernels that `thrift_lab.bench.compile` looks at is what the library launches and nothing else, for GPUs that
need not be there. It also reads trees from before the rooms were cut by flow (`_place`), so that records of older commits can
be made: ``PYTHONPATH=OLDER/src:src python -m thrift_lab.bench compile --commit OLDER``.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

CAPABILITIES = (80, 89, 90, 100, 120)
"""Compute capabilities times ten."""

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head dims that the kernels serve; here, since an older tree may be the one that is compiled."""


@dataclass(frozen=True)
class Case:
    """One call of the library whose launches are looked at.

    Args:
        name: what is computed, as it stands in records.
        flow: ``"prefill"`` or ``"decode"``.
        dim: head dim.
        options: of `ThriftConfig`, by their current names.
        call: of the call: ``window``, ``softcap``, ``tq``, ``high_fraction``, ``ragged``; ``pages`` that a sequence may have.
    """

    name: str
    flow: str
    dim: int
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


PAPER = {
    "center": "none",
    "sink_token": "none",
    "smooth": "none",
    "scales": "max",
    "normalize": "exact",
    "force_last": 0,
}
"""Options of the paper's form, which the kernels serve by branches of their own."""


def cases(dims: Iterable[int], options_at: int = 128) -> list[Case]:
    """Return the calls that a record covers: formats and storages at every head dim, other options at one of them."""
    listed = []
    for dim in dims:
        formats = {"nvfp4": {}, "fp8": {"base_format": "fp8"}, "nvfp4 16bit": {"compute": "16bit"}}
        if dim % 32 == 0:
            formats["mxfp4"] = {"base_format": "mxfp4"}
        listed += [Case(f"prefill {name} D {dim}", "prefill", dim, options) for name, options in formats.items()]
        storages = ("nested", "nested8", "16bit")
        listed += [Case(f"decode {name} D {dim}", "decode", dim, {"promoted_storage": name}) for name in storages]
        short = {"nested": {}, "nested8": {"promoted_storage": "nested8"}, "all promoted": {"budget": 1.0}}
        for name, options in short.items() if dim <= 128 else ():
            listed.append(Case(f"decode short {name} D {dim}", "decode", dim, options, {"pages": 40}))
    windowed = {"window": 200, "softcap": 20.0}
    decode_paper = {name: value for name, value in PAPER.items() if name != "normalize"}
    for flow, name, options, call in (
        ("prefill", "paper's form", PAPER, {}),
        ("prefill", "nested", {"promoted_storage": "nested", "compute": "16bit"}, {}),
        ("prefill", "window softcap", {}, windowed),
        ("prefill", "fp8 window softcap", {"base_format": "fp8"}, windowed),
        ("prefill", "shares", {}, {"high_fraction": True}),
        ("prefill", "16 queries", {}, {"tq": 16}),
        ("decode", "mxfp4", {"base_format": "mxfp4"}, {}),
        ("decode", "4 queries", {}, {"tq": 4}),
        ("decode", "window softcap", {}, windowed),
        ("decode", "short 4 queries", {}, {"tq": 4, "pages": 40}),
        ("decode", "short window softcap", {}, {**windowed, "pages": 40}),
        ("decode", "short paper's form", decode_paper, {"pages": 40}),
        ("decode", "paper's form", decode_paper, {}),
        ("decode", "residuals of a share", {"residual_share": 0.15}, {}),
        ("decode", "16bit copies of a share", {"residual_share": 0.15, "promoted_storage": "16bit"}, {}),
        ("decode", "residuals of a share 4 queries", {"residual_share": 0.15}, {"tq": 4}),
    ):
        listed.append(Case(f"{flow} {name} D {options_at}", flow, options_at, options, call))
    return listed


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be started: all that a compiler needs to know.

    Args:
        case: name of the `Case`.
        capability: of the GPU, times ten.
        kernel: name of the function.
        module: that it stands in.
        index: which of the launches of that kernel in the case.
        signature: types of the arguments by name.
        constants: constexpr arguments by place.
        attributes: what is known of arguments, such as alignment, by place.
        options: of the compiler.
    """

    case: str
    capability: int
    kernel: str
    module: str
    index: int
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        """Constexpr arguments by name."""
        names = list(self.signature)
        return {names[place[0]]: value for place, value in self.constants.items()}


def _place(*names: str) -> Any:
    """Return the first of some modules that this tree has."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    raise ModuleNotFoundError(f"none of {', '.join(names)} is in this tree")


def _config(options: dict[str, Any]) -> Any:
    """Return a ThriftConfig of this tree from options by their current names."""
    config = importlib.import_module("thrift_attn.config")
    options = {"base_format": "nvfp4", "budget": config.fraction(0.05), **options}  # whatever the tree's defaults
    if "base_format" not in config.ThriftConfig.__dataclass_fields__:
        old = {
            "base_format": "low",
            "compute": "math",
            "promoted_storage": "high",
            "normalize": "total",
            "smooth": "balance",
        }
        options = {old.get(name, name): value for name, value in options.items()}
        if "sink_token" in options:
            options["sink"] = {"exact": "token"}.get(options.pop("sink_token"), "none")
    return config.ThriftConfig(**options)


@contextlib.contextmanager
def _pretend(capability: int) -> Iterator[None]:
    """Let host code take CPU tensors for those of a GPU of some capability."""
    import torch

    stand_ins: dict[str, Callable[..., Any]] = {
        "overlaps": lambda device: capability >= 90,
        "multiprocessors": lambda device: 132,
        "_casts": lambda device: capability >= 89,
        "casts_to_e4m3": lambda device: capability >= 89,
    }

    def told(device: Any = None) -> tuple[int, int]:
        return divmod(capability, 10)

    def why_not(q: Any, *_: Any, **__: Any) -> str | None:  # of the FP8 kernel of sm_90, which asks for a CUDA device
        return None if capability == 90 and q.shape[-1] in (64, 128) else "not this call"

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", told))
        for module in [m for n, m in sys.modules.items() if n.startswith("thrift_attn")]:
            for name, stand_in in {**stand_ins, "why_not": why_not, "why_not_sm90_fp8": why_not}.items():
                if name in vars(module):
                    stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


def _run(case: Case, capability: int) -> None:
    """Make the call of a case; nothing is started."""
    import torch

    dtype, dim = torch.bfloat16, case.dim
    tq = case.call.get("tq")
    limits = {name: case.call[name] for name in ("window", "softcap") if name in case.call}
    if case.flow == "prefill":
        ops = _place("thrift_attn.prefill.ops", "thrift_attn.ops")
        layouts = _place("thrift_attn.seq_layout", "thrift_attn.sequences")
        tokens = 2048
        q = torch.zeros(1, 8, tq or tokens, dim, dtype=dtype)
        k, v = torch.zeros(2, 1, 2, tokens, dim, dtype=dtype)
        config = _config(case.options)
        low = case.options.get("base_format", "nvfp4")
        units = capability >= 89 if low == "fp8" else capability in (100, 120)
        dispatch = _place("thrift_attn.dispatch", "thrift_attn.capability")
        names = {str(x) for x in getattr(dispatch.Form, "__args__", ())}
        native = units and case.options.get("compute") != "16bit"
        form = "native" if native else ("decoded" if "decoded" in names else "wide")
        layout = layouts.dense(1, q.shape[2], tokens, True, q.device)
        share = case.call.get("high_fraction", False)
        extra = {"high_fraction": share} if hasattr(layouts, "SeqLayout") else {"mass": share}
        limits = {"window": None, "softcap": None, **limits}
        ops.prefill(q, k, v, layout, config, form, scale=dim**-0.5, **limits, **extra)
        return
    paged = importlib.import_module("thrift_attn.cache.paged")
    options = {"compute": "16bit", "promoted_storage": "nested", **case.options}
    pages = case.call.get("pages", 300)  # more than a program each
    cache = paged.PagedThriftCache(
        batch=2, kv_heads=2, head_dim=dim, num_pages=pages, config=_config(options), dtype=dtype, device="cpu"
    )
    cache.backend = "triton"
    k, v = torch.zeros(2, 2, 2, tq or 1, dim, dtype=dtype)
    cache.append(k, v)
    cache.attend(torch.zeros(2, 8, tq or 1, dim, dtype=dtype), **limits)
    for name in ("thrift_attn.decode.gather", "thrift_attn.cache.widen"):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
            cache.widen()


def launches(case: Case, capability: int) -> list[Launch]:
    """Return what a case starts on a GPU of some capability, by asking the library's launchers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    backend = make_backend(GPUTarget("cuda", capability, 32))
    found: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}
        binder = jit.create_function_from_signature(self.signature, self.params, backend)
        bound, specialisation, options = binder(*args, **kwargs)
        parsed, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialisation, options)
        index = sum(one.kernel == self.fn.__name__ for one in found)
        found.append(
            Launch(
                case.name, capability, self.fn.__name__, self.fn.__module__, index, signature,
                constants, attributes, {k: kwargs[k] for k in kwargs if k in parsed.__dict__ and k != "debug"},
            )
        )  # fmt: skip

    import torch

    # loaded before they are patched
    for name in ("thrift_attn.prefill.ops", "thrift_attn.prefill.sm90_fp8.launch", "thrift_attn.decode.ops", "thrift_attn.ops",
                 "thrift_attn.attend.hopper_launch", "thrift_attn.cache.ops"):  # fmt: skip
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    with mock.patch.object(jit.JITFunction, "run", run), _pretend(capability), torch.inference_mode():
        _run(case, capability)
    return found
