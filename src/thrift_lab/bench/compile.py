"""Compile every kernel for GPUs that are not there, and compare the machine code of two commits: ``thrift bench compile``.

A row is one launch of one kernel on one GPU, as the library itself would start it (`thrift_lab.bench.launches`). It is green
when the products are the instructions they should be, nothing spills, and shared memory is within the GPU's limit. Its hash is
that of the machine instructions; names, file names and line numbers are no part of them, so moving and renaming leaves it
as it is.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from thrift_lab.bench.launches import Case, Launch, launches
from thrift_lab.records import Record, read_json
from thrift_lab.sheet import Sheet

SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Shared memory that one program may have (CUDA programming guide, technical specifications per compute capability)."""

PRODUCTS = {
    "e2m1, nvfp4 scales": r"kind::mxf4nvf4(?!\S*ue8m0)",
    "e2m1, mxfp4 scales": r"kind::mxf4\.|kind::mxf4nvf4\S*ue8m0",  # sm_100, sm_120
    "e4m3": r"(?:wgmma|mma)\S*\.e4m3\.e4m3|tcgen05\.mma\S*kind::f8f6f4",
    "16 bits": r"(?:wgmma|mma)\S*\.bf16\.bf16|tcgen05\.mma\S*kind::f16",
}
"""Matrix instructions in PTX, by kind."""

RENAMED = {
    "merge_splits_kernel": "combine_splits_kernel",
    "widen_kernel": "gather_pages_kernel",
    "levels_kernel": "channel_scales_kernel",
}
"""Today's names of kernels that were called otherwise in older records."""


TOLD = 10
"""Problems that a table names at most."""


class CompiledKernel(BaseModel):
    """What a launch compiled to.

    Args:
        case: name of the `Case`.
        kernel: name of the function.
        index: which of the launches of that kernel in the case.
        capability: of the GPU, times ten.
        code: start of the SHA-256 of the machine instructions; empty if it does not compile.
        registers: of a thread.
        stack: bytes of a thread in local memory: spilled registers.
        shared: bytes of a program.
        products: matrix instructions in the PTX, by kind.
        problems: why the row is not green.
    """

    model_config = ConfigDict(frozen=True)

    case: str
    kernel: str
    index: int
    capability: int
    code: str
    registers: int
    stack: int
    shared: int
    products: dict[str, int] = {}
    problems: list[str] = []

    @property
    def key(self) -> str:
        """What rows of two records are matched by."""
        return f"sm_{self.capability}, {self.case}, {RENAMED.get(self.kernel, self.kernel)} {self.index}"


class CompileRecord(Record):
    """What all kernels compiled to at one commit."""

    SCHEMA: ClassVar[int] = 2

    kind: str = "compile"
    rows: list[CompiledKernel] = Field(default_factory=list)

    def table(self) -> Sheet:
        """See `Record.table`: a row for each GPU."""
        found = []
        for capability in sorted({row.capability for row in self.rows}):
            rows = [row for row in self.rows if row.capability == capability]
            green = sum(not row.problems for row in rows)
            most = (max(getattr(row, name) for row in rows) for name in ("registers", "stack", "shared"))
            kernels = len({row.kernel for row in rows})
            found.append((f"sm_{capability}", *(f"{x:,}" for x in (kernels, len(rows), green, *most))))
        problems = [f"{row.key}: {'; '.join(row.problems)}" for row in self.rows if row.problems]
        if len(problems) > TOLD:
            problems[TOLD:] = [f"and {len(problems) - TOLD} more"]
        head = ("GPU", "kernels", "launches", "green", "most registers", "most spilled bytes", "most shared bytes")
        return Sheet(head, found, caption="\n".join(problems))


def expected(launch: Launch) -> str | None:
    """Return the kind of product that the low path of a prefill attention kernel must have."""
    if launch.kernel != "attend_prefill_kernel":
        return "e4m3" if launch.kernel == "attend_fp8_kernel" else None
    if not launch.named["NATIVE"]:
        return "16 bits"
    base_format = launch.named.get("FORMAT") or launch.named["LOW"]  # LOW in trees before version 0.2
    return {"nvfp4": "e2m1, nvfp4 scales", "mxfp4": "e2m1, mxfp4 scales", "fp8": "e4m3"}[base_format]


def compile_launch(launch: Launch) -> CompiledKernel:
    """Compile one launch; needs Triton, no GPU, and kernels that were not imported for the interpreter."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget

    function = getattr(importlib.import_module(launch.module), launch.kernel)
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source
    about: dict[str, Any] = {
        "case": launch.case,
        "kernel": launch.kernel,
        "index": launch.index,
        "capability": launch.capability,
    }
    try:
        made = triton.compile(
            Source(function, launch.signature, launch.constants, launch.attributes),
            target=GPUTarget("cuda", launch.capability, 32),
            options=launch.options,
        )
    except Exception as error:  # whatever the compiler cannot do is a row that says so
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"[:200]
        return CompiledKernel(**about, code="", registers=0, stack=0, shared=0, problems=[problem])
    sections = _sections(made.asm["cubin"])
    registers, stack = _usage(sections)
    shared, limit, kind = made.metadata.shared, SHARED_BYTES[launch.capability], expected(launch)
    products = {name: len(re.findall(pattern, made.asm["ptx"])) for name, pattern in PRODUCTS.items()}
    problems = [f"{stack} bytes spilled"] * (stack > 0)
    problems += [f"{shared} bytes of shared memory, there are {limit}"] * (shared > limit)
    problems += [f"no product of {kind}"] * (kind is not None and not products[kind])
    return CompiledKernel(
        **about, code=code_of(sections), registers=registers, stack=stack, shared=shared,
        products={name: count for name, count in products.items() if count}, problems=problems,
    )  # fmt: skip


def _sections(cubin: bytes) -> dict[str, bytes]:
    """Return the sections of a 64-bit ELF file by name."""
    offset, _, _, _, _, size, count, names = struct.unpack_from("<QIHHHHHH", cubin, 40)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + at * size) for at in range(count)]
    table = headers[names][4]
    sections = {}
    for name, _, _, _, start, length in headers:
        end = cubin.index(b"\0", table + name)
        sections[cubin[table + name : end].decode()] = cubin[start : start + length]
    return sections


def code_of(sections: dict[str, bytes]) -> str:
    """Return the start of the SHA-256 of the machine instructions of a cubin."""
    code = b"".join(data for name, data in sorted(sections.items()) if name.startswith(".text."))
    if not code:
        raise RuntimeError(f"expected machine code, got sections {', '.join(sections)}")
    return hashlib.sha256(code).hexdigest()[:24]


def _usage(sections: dict[str, bytes]) -> tuple[int, int]:
    """Return registers and bytes of stack of the one kernel of a cubin.

    Source: attributes EIATTR_REGCOUNT (0x2f) and EIATTR_FRAME_SIZE (0x11) of ``.nv.info``, each a symbol and a number.
    """
    data, at, found = sections[".nv.info"], 0, {0x2F: 0, 0x11: 0}
    while at + 4 <= len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == 4:
            if attribute in found and size == 8:
                found[attribute] = max(found[attribute], struct.unpack_from("<II", data, at)[1])
            at += size
    return found[0x2F], found[0x11]


def _same(launch: Launch) -> str:
    """Return a text that two launches share if they compile to the same."""
    return repr(replace(launch, case="", index=0))


def compile_all(listed: list[Launch], workers: int) -> Iterator[CompiledKernel]:
    """Compile launches in several processes; those that differ in nothing but their case are compiled once.

    Rows come in the order of ``listed`` and as they are ready.
    """
    unique = {_same(launch): launch for launch in listed}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        work = {same: pool.submit(compile_launch, launch) for same, launch in unique.items()}
        for launch in listed:
            made = work[_same(launch)].result()
            yield made.model_copy(update={"case": launch.case, "index": launch.index})


def collect(chosen: Iterable[Case], capabilities: Iterable[int]) -> list[Launch]:
    """Return the launches of all cases on all GPUs; a case that a GPU does not serve is left out."""
    found = []
    for capability in capabilities:
        for case in chosen:
            with contextlib.suppress(NotImplementedError):
                found += launches(case, capability)
    return found


@dataclass(frozen=True)
class Difference:
    """A row that two records tell differently; ``before`` or ``after`` is None if it is missing there."""

    key: str
    before: CompiledKernel | None
    after: CompiledKernel | None

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"{self.key}: only {'before' if self.after is None else 'now'}"
        a, b = self.before, self.after
        return f"{self.key}: registers {a.registers} to {b.registers}, stack {a.stack} to {b.stack} bytes"


def compare(before: CompileRecord, after: CompileRecord) -> list[Difference]:
    """Return the rows whose machine code differs between two records."""
    first, second = ({row.key: row for row in record.rows} for record in (before, after))
    found = []
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if a is None or b is None or a.code != b.code:
            found.append(Difference(key, a, b))
    return found


def explained(differences: Iterable[Difference], reasons: dict[str, str]) -> tuple[list[Difference], dict[str, int]]:
    """Part differences by whether a reason is known.

    Args:
        differences: of `compare`.
        reasons: why by pattern of `Difference.key`, in the style of shell wildcards.

    Returns:
        Those without a reason, and how many each pattern explains.
    """
    unexplained, counts = [], dict.fromkeys(reasons, 0)
    for difference in differences:
        pattern = next((p for p in reasons if fnmatch.fnmatchcase(difference.key, p)), None)
        if pattern is None:
            unexplained.append(difference)
        else:
            counts[pattern] += 1
    return unexplained, counts


def load_reasons(path: Path) -> dict[str, str]:
    """Return the reasons of a JSON file: one object, patterns and why."""
    return read_json(path)
