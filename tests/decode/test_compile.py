"""The decode kernel compiles, without spilling, for GPUs that are not there, to the instructions it was written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Kernels that were imported for the interpreter cannot be compiled, so this runs in a process of its own.
_PROGRAM = """
import json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from thrift_attn.decode import attend as decode, tensors
from thrift_attn.reference.page_layout import plane_size

plane, dim, group, capability, record = json.loads(sys.argv[1])
fn = decode.attend_split_kernel
tile = decode.column_tile(group, 1, dim)
tuned = decode.tuning(dim, tile, False, plane)
high = "*bf16" if plane == "16bit" else "*i32"
kinds = ["*bf16", "*i32", "*i32", high, "*bf16", "*i32", "*fp32", "*i32", "*i32", "*i32", "*fp32", "*fp32", "*fp32", "*fp32"]
pointers = dict(zip(fn.arg_names, kinds))
numbers = dict(scale="fp32", stride_qb="i32", stride_qh="i32", stride_qt="i32", window="i32", blocks="i32")
words, high_words = plane_size(dim, 4).words, 128 * dim if plane == "16bit" else plane_size(dim, 8).words
strides = dict(BASE_PAGE=8 * words, BASE_HEAD=words, HIGH_PAGE=8 * high_words, HIGH_HEAD=high_words)
ring = dict(RING=128, TAIL_RING=2048 * dim, TAIL_KV=1024 * dim, TAIL_HEAD=128 * dim, TAIL_TOKEN=dim)
if record:  # base, residual and mean of a head beside each other
    strides = {name: 8 * (words + high_words + dim // 2) // (1 if "PAGE" in name else 8) for name in strides}
    ring = dict(RING=73, TAIL_RING=2**20, TAIL_KV=dim, TAIL_HEAD=146 * dim, TAIL_TOKEN=2 * dim)
constants = dict(
    HKV=8, GROUP=group, TQ=1, D=dim, CHUNKS=decode.chunks(dim, tuned.chunk), N=tile,
    RP=tensors.padded_rows(group, 1), HIGH=decode.HIGH[plane], CENTRED=True, WINDOW=False, CAP=0.0, SCALED=True, tq=1,
    PORTABLE=False, OVERLAP=capability >= 90, **strides, **ring,
)
signature = {n: {**pointers, **numbers}.get(n, "constexpr") for n in fn.arg_names}
aligned = [*pointers, "stride_qb", "stride_qh", "stride_qt"]
attrs = {(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
kernel = triton.compile(
    ASTSource(fn, signature, constexprs=constants, attrs=attrs),
    target=GPUTarget("cuda", capability, 32),
    options=dict(num_warps=1, num_stages=1, maxnreg=tuned.maxnreg),
)
cubin = Path(sys.argv[2])
cubin.write_bytes(kernel.asm["cubin"])
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
ptx = kernel.asm["ptx"]
print(json.dumps(dict(
    registers=int(re.search(r"REG:(\\d+)", usage)[1]), stack=int(re.search(r"STACK:(\\d+)", usage)[1]),
    products=ptx.count("mma.sync.aligned.m16n8k16"), transposes=ptx.count("movmatrix"), wide=ptx.count("ld.global.v4"),
)))
"""


@pytest.mark.parametrize(
    ("plane", "dim", "group", "capability", "record"),
    [
        ("nested", 64, 4, 80, False), ("nested", 128, 4, 90, False), ("16bit", 64, 12, 100, False),
        ("nested8", 80, 4, 120, False), ("nested", 128, 4, 90, True),
    ],
)  # fmt: skip
def test_compiles_without_spills(
    plane: str, dim: int, group: int, capability: int, record: bool, tmp_path: Path
) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [
        sys.executable,
        "-c",
        _PROGRAM,
        json.dumps([plane, dim, group, capability, record]),
        str(tmp_path / "kernel.cubin"),
    ]
    # The compiler reads kernels from files, which `-c` has none of; the kernel itself is imported.
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["stack"] == 0, facts
    tiles, columns = dim // 16, 2 if group > 8 else 1
    assert facts["products"] >= 8 * tiles * columns  # K and V of one block in low precision
    assert facts["transposes"] >= 8 * columns
    assert facts["wide"] >= 2 * tiles


_SELECTION = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from thrift_attn.decode import select as kernels

pad, warps, capability = json.loads(sys.argv[1])
fn, keys = kernels.select_blocks_kernel, pad // 32 // warps
constants = dict(
    FIRST=1, LAST=1, HKV=8, WINDOW=False, PAD=pad, KEYS=keys, SEARCH=kernels._search_asm(keys),
    REGISTERS=",".join(["=r"] * keys + ["r"] * 2 * keys), PORTABLE=False, OVERLAP=capability >= 90,
    SHORT=pad, SHORT_KEYS=keys, SHORT_SEARCH="", SHORT_REGISTERS="", PACKED=False, POOLED=False,
)
types = {n: "*fp32" if n == "score_ptr" else "*i32" if n.endswith("_ptr") else "i32" for n in fn.arg_names}
signature = {n: "constexpr" if n in constants else t for n, t in types.items()}
attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(fn.arg_names) if n.endswith("_ptr")}
kernel = triton.compile(
    ASTSource(fn, signature, constexprs=constants, attrs=attrs),
    target=GPUTarget("cuda", capability, 32),
    options=dict(num_warps=warps),
)
print(kernel.asm["ptx"].count("bar.red.popc"))
"""


@pytest.mark.parametrize(("pad", "warps", "capability"), [(64, 1, 80), (2048, 16, 90), (1024, 16, 120)])
def test_the_search_of_the_selection_is_one_loop(pad: int, warps: int, capability: int) -> None:
    """Every thread must hold its keys in one statement: two copies of the search would each count a part of the keys."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", _SELECTION, json.dumps([pad, warps, capability])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == (pad // 32 // warps).bit_length()


_EACH = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from thrift_lab.bench.compile import _sections, _usage
from thrift_lab.bench.launches import Case, launches

dim, capability, options, call = json.loads(sys.argv[1])
(launch,) = [x for x in launches(Case("", "decode", dim, options, call), capability) if x.kernel == "attend_each_kernel"]
function = getattr(importlib.import_module(launch.module), launch.kernel)
kernel = triton.compile(
    ASTSource(function, launch.signature, launch.constants, launch.attributes),
    target=GPUTarget("cuda", capability, 32),
    options=launch.options,
)
before, *_ = kernel.asm["ptx"].split("griddepcontrol.wait")
print(json.dumps(dict(stack=_usage(_sections(kernel.asm["cubin"]))[1], early=before.count("ld.global.cg.v4"))))
"""


@pytest.mark.parametrize(
    ("dim", "capability", "options", "call"),
    [
        (64, 80, {}, {}), (128, 90, {}, {}), (128, 100, {"promoted_storage": "nested8"}, {"tq": 4}),
        (128, 90, {"budget": 1.0}, {"window": 200, "softcap": 20.0}), (80, 120, {}, {}),
    ],
)  # fmt: skip
def test_a_program_for_each_block_has_it_before_the_scores(
    dim: int, capability: int, options: dict, call: dict
) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", _EACH, json.dumps([dim, capability, options, {**call, "pages": 40}])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["stack"] == 0, facts
    if capability >= 90 and "budget" not in options:
        assert facts["early"] >= 2 * (dim // 16)


_STEP = """
import json, sys
from thrift_lab.bench.compile import compile_launch
from thrift_lab.bench.launches import Case, launches

calls = {"": {}, "short": {"pages": 40}}
listed = [x for name, call in calls.items() for x in launches(Case(name, "decode", 64, {}, call), 90)]
print(json.dumps({launch.kernel: compile_launch(launch).problems for launch in listed}))
"""


def test_every_kernel_of_a_step_compiles() -> None:
    """`make test` runs this one with every Triton that is served: a newer compiler takes what an older one does not."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", _STEP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "write_tail_kernel": [], "pack_blocks_kernel": [], "block_scores_kernel": [], "select_blocks_kernel": [],
        "attend_split_kernel": [], "attend_each_kernel": [], "combine_splits_kernel": [], "gather_pages_kernel": [],
    }  # fmt: skip
