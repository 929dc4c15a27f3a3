"""Compile the prefill kernels for GPUs that are not there, and look at what came out: ``thrift bench compile``.

A row is one kernel for one format, head dim and compute capability, with the settings a call would use. It is green when
the products are the instructions they should be, nothing spills, and registers and shared memory are within the GPU's limits.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

from thrift_attn.dispatch import HEAD_DIMS, Form
from thrift_attn.reference.formats import FORMATS
from thrift_lab.bench.bench_records import make_context
from thrift_lab.provenance import write_json

CAPABILITIES = (80, 89, 90, 100, 120)
"""Compute capabilities times ten."""

SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Shared memory that one program may have (CUDA programming guide, technical specifications per compute capability)."""

GROUP = 4
"""Query heads per KV head of the compiled kernels."""

Kernel = Literal["attend", "select", "quantise_kv", "quantise_q", "sum_keys", "sum_queries", "levels"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
"""Slowest to compile first."""


@dataclass(frozen=True)
class Target:
    """What to compile.

    Args:
        kernel: which.
        capability: compute capability times ten.
        dim: head dim.
        low: format; of ``select`` without meaning.
        math: arithmetic, see `ThriftConfig`.
        blocks: KV blocks of the longest sequence; only ``select`` depends on it.
    """

    kernel: Kernel
    capability: int
    dim: int
    low: str = "nvfp4"
    math: str = "fp4"
    blocks: int = 1024

    @property
    def form(self) -> Form:
        """How the GPU multiplies the format."""
        units = self.capability >= 89 if self.low == "fp8" else self.capability in (100, 120)
        return "native" if units and self.math == "fp4" else "wide"


@dataclass(frozen=True)
class Compiled:
    """What came out.

    Args:
        target: of the compilation.
        registers: of a thread.
        stack: bytes of a thread in local memory: spilled registers.
        shared: bytes of a program.
        products: matrix instructions in the PTX, by kind.
        problems: why the row is not green.
        seconds: that it took.
    """

    target: Target
    registers: int
    stack: int
    shared: int
    products: dict[str, int]
    problems: list[str]
    seconds: float


PRODUCTS = {
    "e2m1, nvfp4 scales": r"kind::mxf4nvf4(?!\S*ue8m0)",
    "e2m1, mxfp4 scales": r"kind::mxf4\.|kind::mxf4nvf4\S*ue8m0",  # sm_100, sm_120
    "e4m3": r"(?:wgmma|mma)\S*\.e4m3\.e4m3|tcgen05\.mma\S*kind::f8f6f4",
    "16 bits": r"(?:wgmma|mma)\S*\.bf16\.bf16|tcgen05\.mma\S*kind::f16",
}


def expected(target: Target) -> str | None:
    """The kind of product that the low path of an attention kernel must have."""
    if target.kernel != "attend":
        return None
    if target.form == "wide":
        return "16 bits"
    return {"nvfp4": "e2m1, nvfp4 scales", "mxfp4": "e2m1, mxfp4 scales", "fp8": "e4m3"}[target.low]


def _types(target: Target) -> tuple[str, str]:
    """Triton's names for packed data and for their scales."""
    if target.form == "wide":
        return "*bf16", "*fp32" if target.low == "fp8" else "*bf16"
    return ("*fp8e4nv", "*fp32") if target.low == "fp8" else ("*u8", "*u8")


def _launch(target: Target) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """Kernel, types of its arguments, constants and compile options, as its launcher in the library would choose them."""
    from thrift_attn.prefill import attend, select
    from thrift_attn.prefill import pack as quant
    from thrift_attn.prefill import statistics as levels

    data, scale = _types(target)
    width = 1 << (target.dim - 1).bit_length()
    cast, native = target.capability >= 89, target.form == "native"
    shape = {"D": target.dim, "DP": width, "ONE_PART": True}
    heads = {"HQ": 8 * GROUP, "HKV": 8}
    packed = {"kp_ptr": data, "ks_ptr": scale, "vp_ptr": data, "vs_ptr": scale, "qp_ptr": data, "qs_ptr": scale}
    packed |= dict.fromkeys(("spans_ptr", "list_ptr", "counts_ptr", "wanted_ptr"), "*i32")
    singles = "lse mass sink mean scratch of_call keys values squares totals sums"
    packed |= {f"{name}_ptr": "*fp32" for name in singles.split()}
    packed |= {"scale": "fp32"}
    four = target.math == "fp4" and target.low in ("nvfp4", "mxfp4")  # then Q lacks its mean, by default
    levelled = target.low in ("nvfp4", "mxfp4")  # by default
    rounding = {"LOW": target.low, "BEST": True, "NATIVE": native, "CAST": cast}
    rounding["TOKENS"] = quant.tokens_at_a_time(target.low)
    warps = quant.warps_for(width)
    if target.kernel == "quantise_kv":
        constants = {**shape, **rounding, "HKV": 8, "GROUP": GROUP * four, "REST": "none", "CENTRED": True}
        constants |= {"SINK": True, "BALANCED": levelled}
        return quant.quantise_kv_kernel, packed, constants, {"num_warps": warps}
    if target.kernel == "quantise_q":
        constants = {**shape, **rounding, **heads, "CAUSAL": True, "SINK": True}
        constants |= {"REDUCED": four, "BALANCED": levelled and four}
        return quant.quantise_q_kernel, packed, constants, {"num_warps": warps}
    sample = {
        "S": 64,
        "SK": 64,
        "SQ": 64,
        "GROUP": GROUP,
        "CAUSAL": True,
        "CENTRED": True,
        "LESS_MEAN": four,
        "BALANCED": True,
    }
    for kernel in (levels.sum_keys_kernel, levels.sum_queries_kernel, levels.levels_kernel):
        if kernel.__name__ == f"{target.kernel}_kernel":
            constants = {**shape, **heads, **sample}
            return kernel, packed, {name: constants[name] for name in kernel.arg_names if name in constants}, {}
    if target.kernel == "select":
        pad = max(16, 1 << (target.blocks - 1).bit_length())
        constants = {
            **shape, **heads, "CAUSAL": True, "WINDOW": False, "FIRST": 0, "LAST": 1, "SINK": True, "PAD": pad,
            "ROWS": select.ROWS, "SUB": max(1, min(select.ROWS, select.HELD // pad)),
            "BN": select.blocks_scored_at_once(target.dim, pad), "PORTABLE": False,
        }  # fmt: skip
        return select.select_rows_kernel, packed, constants, {"num_warps": max(4, pad // 1024)}
    tuned = attend.tuning(target.dim, target.low, target.form, divmod(target.capability, 10))
    constants = {
        **shape, **heads, "CAUSAL": True, "WINDOW": False, "CAP": 0.0, "LOW": target.low, "QUANT": target.math == "fp4",
        "NATIVE": native, "CENTRED": True, "KEY_BIAS": four,
        "LEVELLED": native and target.low == "nvfp4", "ROUNDED": four, "REST": False, "MASS": False, "SINK": True,
        "BM": tuned.rows, "BN": tuned.tokens, "CENTRES": tuned.centres, "COLUMNS": min(width, tuned.columns),
        "STAGES": tuned.stages, "CAST": cast, "PORTABLE": False,
    }  # fmt: skip
    return attend.attend_prefill_kernel, packed, constants, {"num_warps": tuned.warps, "num_stages": tuned.stages}


def compile_target(target: Target) -> Compiled:
    """Compile one target; needs Triton, no GPU, and kernels that were not imported for the interpreter.

    Raises:
        RuntimeError: Triton's tools cannot read what it made.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    began = time.monotonic()
    kernel, types, constants, options = _launch(target)
    names = kernel.arg_names
    kinds = {name: types.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in names}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    aligned = [at for at, name in enumerate(names) if name.endswith("_ptr") or name.startswith("stride_")]
    found = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs={(at,): [["tt.divisibility", 16]] for at in aligned}),
        target=GPUTarget("cuda", target.capability, 32),
        options=options,
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(found.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    numbers = {name: re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK")}
    if None in numbers.values():
        raise RuntimeError(f"cuobjdump did not say what the kernel uses: {usage[:300]!r}")
    registers, stack = (int(numbers[name][1]) for name in ("REG", "STACK"))  # pyright: ignore[reportOptionalSubscript]
    products = {name: len(re.findall(pattern, found.asm["ptx"])) for name, pattern in PRODUCTS.items()}
    shared, limit = found.metadata.shared, SHARED_BYTES[target.capability]
    problems = [f"{stack} bytes spilled"] * (stack > 0)
    problems += [f"{shared} bytes of shared memory, there are {limit}"] * (shared > limit)
    kind = expected(target)
    problems += [f"no product of {kind}"] * (kind is not None and not products[kind])
    return Compiled(target, registers, stack, shared, products, problems, round(time.monotonic() - began, 1))


def targets(dims: Iterable[int] = HEAD_DIMS, capabilities: Iterable[int] = CAPABILITIES) -> Iterator[Target]:
    """Every kernel that calls on these GPUs with these head dims can need; nested planes and masks aside."""
    for capability in capabilities:
        for dim in dims:
            for low in ("nvfp4", "mxfp4", "fp8"):
                if dim % (FORMATS[low].group or 1) or (low == "fp8" and capability < 89):
                    continue
                for kernel in ("attend", "quantise_kv", "quantise_q"):
                    yield Target(kernel, capability, dim, low)
            yield Target("attend", capability, dim, "nvfp4", "16bit")
            for kernel in ("select", "sum_keys", "sum_queries", "levels"):
                yield Target(kernel, capability, dim)


def compile_all(found: Iterable[Target], workers: int) -> Iterator[Compiled]:
    """Compile targets in several processes, in order."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(compile_target, found)


def save(rows: Iterable[Compiled], path: Path) -> None:
    """Write the record."""
    listed = [{**asdict(row.target), "form": row.target.form, **asdict(row)} for row in rows]
    for row in listed:
        del row["target"]
    write_json(path, {"kind": "compile", "schema": 1, "context": make_context({}), "rows": listed})
