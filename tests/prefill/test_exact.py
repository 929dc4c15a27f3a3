"""Exact attention on a GPU as dispatch hands calls to it: against float64, by whoever is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from thrift_attn import ThriftConfig, attention, fraction
from thrift_attn.exact import Call, exact_server, why_not_exact
from thrift_attn.interface import attend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EVERY = ThriftConfig(exact_below=1 << 20)
"""Exact at every length of these tests, on any GPU."""


def qkv(queries: int, keys: int, dim: int, dtype: torch.dtype, batch: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(queries + keys)
    heads = ((8, queries), (2, keys), (2, keys))
    return tuple(torch.randn(batch, h, n, dim, device="cuda", dtype=dtype) for h, n in heads)


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    config = ThriftConfig(base_format="nvfp4", budget=fraction(1))
    wide = (x.double() for x in (q, k, v))
    return attention(*wide, config=config, return_lse=True, backend="reference", **options)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 999), (16, 999), (999, 999), (300, 999)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"softcap": 15.0}, {"scale": 0.2}], ids=str)
@pytest.mark.parametrize("lse", [False, True])
def test_exact_calls_are_right_whoever_serves_them(dtype, dim, queries, keys, options, lse):
    q, k, v = qkv(queries, keys, dim, dtype)
    call = Call(
        device=q.device, dtype=dtype, head_dim=dim, queries=queries, keys=keys, causal=options.get("causal", True),
        softcap=options.get("softcap"), lse=lse,
    )  # fmt: skip
    found = attend(q, k, v, config=EVERY, return_lse=lse, return_stats=True, **options)
    assert found.served.by == ("exact" if why_not_exact(call) is None else "triton")
    want, want_lse = expected(q, k, v, **options)
    eps = torch.finfo(dtype).eps
    assert (found.out.double() - want).norm() < 2 * eps * want.norm()  # rounding of P and of the output
    if lse:
        torch.testing.assert_close(found.lse.double(), want_lse, rtol=1e-4, atol=1e-3)
    assert found.stats.exact == found.stats.visible == found.stats.promoted


def test_a_row_of_a_padded_batch_is_that_of_the_row_alone():
    q, k, v = qkv(700, 700, 128, torch.bfloat16, batch=3)
    lengths = [700, 130, 333]
    config = EVERY.with_(exact_below=400, base_format="fp8") if torch.cuda.get_device_capability() >= (8, 9) else EVERY
    out = attend(q, k, v, config=config, kv_lengths=torch.tensor(lengths, device="cuda")).out
    for row, n in enumerate(lengths):
        own = q[row : row + 1, :, 700 - n :], k[row : row + 1, :, :n], v[row : row + 1, :, :n]
        alone = attend(*own, config=config)
        if n < 400:
            assert alone.served.by == "exact"
            assert torch.equal(out[row : row + 1, :, 700 - n :], alone.out)
        assert not out[row, :, : 700 - n].any()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="measured on sm_90 alone"
)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_default_on_hopper(dim):
    short, long = (attend(*qkv(n, n, dim, torch.bfloat16, batch=1)) for n in (1000, 20_000))
    assert (short.served.by, long.served.by, long.served.config.base_format) == ("exact", "triton", "fp8")
    call = Call(device=short.out.device, dtype=torch.bfloat16, head_dim=dim, queries=1000, keys=1000)
    assert exact_server(call) in short.served.why
    assert long.stats.exact == 0


def test_exact_calls_can_be_captured():
    q, k, v = qkv(500, 500, 64, torch.bfloat16)
    want = attend(q, k, v, config=EVERY).out
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend(q, k, v, config=EVERY)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, config=EVERY).out
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


def test_lengths_that_cannot_be_looked_at_go_to_the_kernels():
    """While a graph is captured, every row goes to the kernels, which promote every block of the short ones."""
    q, k, v = qkv(300, 300, 64, torch.bfloat16)
    lengths = torch.tensor([300, 120], device="cuda")
    options = {"config": EVERY, "kv_lengths": lengths}
    want = attend(q, k, v, **options).out
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend(q, k, v, config=EVERY, kv_lengths=lengths, backend="triton")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q, k, v, **options)
    graph.replay()
    torch.cuda.synchronize()
    assert captured.served.by == "triton"
    torch.testing.assert_close(captured.out, want, rtol=0, atol=2e-2)


def test_the_reference_agrees_on_the_device():
    q, k, v = qkv(150, 400, 64, torch.float16, batch=1)
    found, want = (attend(q, k, v, config=EVERY, backend=backend) for backend in ("auto", "reference"))
    assert (found.served.by, want.served.by) == ("exact", "reference")
    torch.testing.assert_close(found.out, want.out, rtol=0, atol=4e-3)
