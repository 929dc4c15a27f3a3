"""Pages back to 16 bits: the kernel writes what the pages decode to in plain PyTorch, bit for bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

from support.kernel_caches import make, query, tokens
from thrift_attn.cache.tiles import attend_in_tiles
from thrift_attn.config import ThriftConfig
from thrift_attn.decode.gather import gather_pages


def filled(lengths, **options):
    """A cache that reads with the kernels and one that reads in PyTorch, over the same pages, written in PyTorch."""
    plain = make("reference", batch=len(lengths), heads=1, **options)
    plain.append(*tokens(max(lengths), batch=len(lengths), heads=1, dim=plain.head_dim), lengths=lengths)
    kernels = copy.copy(plain)
    kernels.backend = "triton"
    return kernels, plain


CASES = [
    (ThriftConfig.for_cache(), 64, 1),
    (ThriftConfig.for_cache(promoted_storage="nested8", center="none", sink_token="none"), 80, 63),
    (ThriftConfig.for_cache(promoted_storage="16bit"), 64, 64),
    (ThriftConfig.for_cache(base_format="mxfp4"), 96, 65),
]


@pytest.mark.parametrize(("config", "dim", "length"), CASES)
def test_kernel_equals_pytorch(config, dim, length):
    lengths = [length, 66]
    kernels, plain = filled(lengths, config=config, dim=dim)
    for got, want in zip(kernels.widen(room=3), plain.widen(room=3), strict=True):
        assert got.shape == (2, 1, 69, dim)
        assert torch.equal(got, want)
        assert not got[0, :, length:].any()


def test_poisoned_pages_of_others_are_not_read():
    kernels, plain = filled([65, 66])
    want = [x[1, :, :66].clone() for x in plain.widen()]
    for page in kernels.table.pages(0).tolist():
        kernels.pool.base[page] = kernels.pool.high[page] = -1
        kernels.pool.k_block_mean[page] = torch.nan
    kernels.tail[0] = torch.nan
    for got, expected in zip(kernels.widen(), want, strict=True):
        assert torch.equal(got[1, :, :66], expected)


@pytest.mark.parametrize("config", [case[0] for case in CASES[:3]], ids=["nested", "nested8", "16bit"])
def test_tiles_equal_the_whole(config):
    kernels, _ = filled([140, 66], config=config)
    every = kernels.widen()
    for start, most in ((0, 64), (64, 64), (64, 128), (128, None)):
        for got, want in zip(kernels.widen(start=start, most=most), every, strict=True):
            assert torch.equal(got, want[:, :, start : None if most is None else start + most])


def test_a_chunk_in_tiles_by_kernels_and_in_pytorch():
    """Sequences that end in other tiles; what this device computes exact attention with, kernels, and the reference."""
    cache, _ = filled([140, 66], config=ThriftConfig.for_cache())
    k, v = tokens(180, batch=2, heads=1)
    new, q = [x[:, :, 140:] for x in (k, v)], query(40, batch=2, heads=2)
    want, want_lse = attend_in_tiles(cache, q, new[0], new[1], tile=64, backend="reference")
    for backend in ("auto", "triton"):
        out, lse = attend_in_tiles(cache, q, new[0], new[1], tile=64, backend=backend)
        assert (out.float() - want.float()).norm() <= 2e-3 * want.float().norm()
        assert (lse - want_lse).abs().max() < 3e-3


def test_too_little_room_is_an_error():
    kernels, _ = filled([70])
    out = torch.zeros(1, 1, 69, 64, dtype=torch.float16, device=kernels.device)
    with pytest.raises(ValueError, match="room for 70"):
        gather_pages(out, out, cache=kernels.tensors(), numerics=kernels.numerics, tokens=70)
    with pytest.raises(ValueError, match="start at a multiple of 64"):
        gather_pages(out, out, cache=kernels.tensors(), numerics=kernels.numerics, tokens=64, start=6)


# Kernels that were imported for the interpreter cannot be compiled, so this runs in a process of its own.
_PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from thrift_attn.decode.gather import gather_pages_kernel as fn
from thrift_attn.reference.page_layout import HIGH

for plane, dim, capability in (("nested", 128, 90), ("nested8", 80, 80), ("16bit", 64, 120)):
    high = ("*bf16", "*bf16") if plane == "16bit" else ("*i16", "*i32")
    scales = ["*fp32", "*fp32", "*i32"]
    kinds = ["*bf16", "*bf16", "*i16", "*i32", "*bf16", *high, "*bf16", "*i32", "*bf16", "*i32", "*i32", *scales]
    signature = dict(zip(fn.arg_names, [*kinds, "i32", "i32", "i32"] + ["constexpr"] * 22))
    strides = {f"{name}_{what}": 16 for name in ("BASE", "HIGH", "MEAN") for what in ("PAGE", "HEAD")}
    strides |= dict(FIRST_PAGE=4672, FIRST_HEAD=16, FIRST_IN_PAGE=True, FIXED=True)
    strides |= dict(RING=73, TAIL_RING=4096, TAIL_KV=16, TAIL_HEAD=32, TAIL_TOKEN=64)
    constants = dict(**strides, HKV=8, D=dim, HIGH=HIGH[plane], CENTRED=True, SINK=True, SCALED=True, POOLED=plane != "nested")
    source = ASTSource(fn, signature, constexprs=constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=1))
    assert len(kernel.asm["cubin"]) > 1000
    print("compiled", plane)
"""


def test_compiles_for_gpus_that_are_not_there():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("compiled") == 3
