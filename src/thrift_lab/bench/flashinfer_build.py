"""FlashInfer compiles its kernels when they are first used; this does it beforehand, side by side and bounded in time.

The compiler runs in a process of its own (``python -m thrift_lab.bench.flashinfer_build``), so that it can be stopped, and so
that other baselines can be timed meanwhile.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from thrift_attn.config import BLOCK
from thrift_lab.bench.cases import DTYPES, DecodeCase

Kind = Literal["prefill", "decode", "xqa"]
"""FlashInfer's names: its tensor-core decode is its prefill kernel; ``decode`` runs on CUDA cores."""


@dataclass(frozen=True)
class Spec:
    """One module that FlashInfer compiles.

    Args:
        kind: which kernel.
        dtype: of Q and the output.
        fp8: whether K and V are e4m3.
        head_dim: D.
        group: query heads of a KV head; 0 where the module does not depend on it.
    """

    kind: Kind
    dtype: str
    fp8: bool
    head_dim: int
    group: int

    @classmethod
    def of(cls, kind: Kind, case: DecodeCase, fp8: bool) -> Spec:
        """The module that a case needs."""
        return cls(kind, case.dtype, fp8, case.head_dim, case.group if kind == "xqa" else 0)

    def generate(self) -> Any:
        """FlashInfer's own description of the module (its JitSpec)."""
        import torch

        q = DTYPES[self.dtype]
        kv = torch.float8_e4m3fn if self.fp8 else q
        d = self.head_dim
        if self.kind == "xqa":
            return importlib.import_module("flashinfer.jit.xqa").gen_xqa_module(
                q, kv, BLOCK, d, self.group, False, q, 1
            )
        modules = importlib.import_module("flashinfer.jit.attention.modules")
        common = (q, kv, q, torch.int32, d, d, 0, False, False)
        if self.kind == "decode":
            return modules.gen_batch_decode_module(*common)
        return modules.gen_batch_prefill_module("fa2", *common, False)


def specs_for(cases: Iterable[DecodeCase]) -> list[Spec]:
    """Everything the FlashInfer baselines need for these cases, 8-bit first."""
    specs: dict[Spec, None] = {}
    for case in cases:
        for fp8 in (True, False):
            specs[Spec.of("xqa", case, fp8)] = None
            specs[Spec.of("prefill", case, fp8)] = None
            if case.group == 1:
                specs[Spec.of("decode", case, fp8)] = None
    return list(specs)


class Builder:
    """The compiling process.

    Args:
        specs: modules to build.
        seconds: time after which it is stopped.
    """

    def __init__(self, specs: list[Spec], seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.seconds = seconds
        self.problems: dict[Spec, str] = {}
        self.specs = specs
        self.process: subprocess.Popen[str] | None = None
        if specs and importlib.util.find_spec("flashinfer") is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps([asdict(spec) for spec in specs])],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until all is built or the time is up; then note what went wrong with which module."""
        if self.process is None:
            return
        try:
            said, _ = self.process.communicate(timeout=max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            said, _ = self.process.communicate()
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        told = {Spec(**line["spec"]): line["problem"] for line in lines}
        for spec in self.specs:
            missing = f"compiling {spec.kind} did not finish within {self.seconds:.0f} s"
            problem = told.get(spec, missing)
            if problem:
                self.problems[spec] = problem
        self.process = None

    def stop(self) -> None:
        """End the compilers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


_builder: Builder | None = None


def start(cases: Iterable[DecodeCase], seconds: float) -> Builder:
    """Begin to compile what the cases need."""
    global _builder
    if _builder is not None:
        _builder.stop()
    _builder = Builder(specs_for(cases), seconds)
    return _builder


def problem(spec: Spec) -> str | None:
    """Why a module cannot be used, None if it can; waits for the compiler."""
    if _builder is None:
        return None  # FlashInfer compiles on first use
    _builder.wait()
    return _builder.problems.get(spec)


def _build(spec: Spec) -> None:
    """Compile one module and print the outcome as a line of JSON."""
    began = time.monotonic()
    problem: str | None = None
    try:
        found = spec.generate()
        if not found.is_aot:
            found.build(False)
    except Exception as error:
        problem = f"compiling {spec.kind}: {type(error).__name__}: {str(error)[-600:]}"
    line = {"spec": asdict(spec), "problem": problem, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps(line), flush=True)


def main(text: str) -> None:
    """Build the modules named in a JSON list, all at once."""
    specs = [Spec(**one) for one in json.loads(text)]
    os.nice(10)  # other baselines are being timed
    os.environ.setdefault("MAX_JOBS", str(max(2, (os.cpu_count() or 4) // 2)))
    for module in ("flashinfer.jit.attention.modules", "flashinfer.jit.xqa"):
        importlib.import_module(module)  # threads that import these at the same time lock each other out
    with ThreadPoolExecutor(max(1, len(specs))) as pool:
        list(pool.map(_build, specs))


if __name__ == "__main__":
    main(sys.argv[1])
