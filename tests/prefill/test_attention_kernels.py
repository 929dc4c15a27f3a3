"""The public calls on the kernels: the same results and statistics as on the reference."""

from __future__ import annotations

import pytest
import torch

from support.device import DEVICE
from support.prefill import DTYPE, draw
from thrift_attn import ThriftConfig, attention, attention_varlen, fraction, top_k
from thrift_attn.reference.formats import FORMATS

CONFIG = ThriftConfig(base_format="nvfp4", compute="16bit", budget=fraction(0.4))


def same(got, want) -> None:
    """Outputs in DTYPE of size 1, LSE of size 10, from float32 arithmetic in another order."""
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [
        (65, 200, {}),
        (70, 70, {"causal": False, "scale": 0.2}),
        (100, 130, {"window": 80, "softcap": 10.0}),
        pytest.param(7, 200, {}, marks=pytest.mark.slow),
        (100, 200, {"kv_lengths": torch.tensor([200, 60])}),
        (9, 200, {"kv_lengths": torch.tensor([5, 150])}),
    ],
)
def test_backends_agree(queries: int, keys: int, options: dict) -> None:
    torch.manual_seed(queries)
    q, k, v = draw(2, (2, 1), queries, keys, 64)
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    got, want = (
        attention(q, k, v, config=CONFIG, return_lse=True, return_stats=True, backend=backend, **options)
        for backend in ("triton", "reference")
    )
    same(got, want)
    a, b = got[2], want[2]
    assert (a.visible, a.promoted, a.rows) == (b.visible, b.promoted, b.rows)
    assert a.asked == pytest.approx(b.asked)
    assert a.mass == pytest.approx(b.mass, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_agrees(causal: bool) -> None:
    """Among the sequences: one query, no query, no key, more queries than keys."""
    torch.manual_seed(1)
    lengths = [(65, 130), (1, 70), (0, 20), (30, 0), (40, 30)]
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in draw(1, (2, 1), 136, 250, 64))
    cu = [torch.tensor([0, *x], device=DEVICE).cumsum(0).int() for x in zip(*lengths, strict=True)]
    got, want = (
        attention_varlen(q, k, v, *cu, 65, 130, config=CONFIG, causal=causal, return_lse=True, backend=backend)
        for backend in ("triton", "reference")
    )
    same(got, want)


@pytest.mark.parametrize(
    ("queries", "lengths"),
    [
        pytest.param(400, [400, 249], marks=pytest.mark.slow),
        pytest.param(400, [250, 400], marks=pytest.mark.slow),
        (20, [400, 260]),
        pytest.param(21, [400, 249], marks=pytest.mark.slow),
    ],
)
def test_short_rows_promote_every_block(queries: int, lengths: list[int]) -> None:
    """Of a batch, by keys and queries; the log-sum-exp keeps it on the kernels. Packed sequences, by keys alone."""
    torch.manual_seed(queries)
    config = CONFIG.with_(budget=fraction(0), exact_below=250)
    q, k, v = draw(2, (2, 1), queries, 400, 64)
    options = {
        "config": config,
        "kv_lengths": torch.tensor(lengths, device=DEVICE),
        "return_stats": True,
        "return_lse": True,
    }
    got, want = (attention(q, k, v, backend=backend, **options) for backend in ("triton", "reference"))
    same(got, want)
    assert (got[2].promoted, got[2].exact, got[2].asked) == (want[2].promoted, want[2].exact, want[2].asked)
    assert 0 < want[2].exact == want[2].promoted or lengths == [250, 400]
    dense, every = (attention(q, k, v, config=c, return_lse=True, backend="triton") for c in (config, CONFIG))
    exact = attention(q, k, v, config=CONFIG.with_(budget=fraction(1)), return_lse=True, backend="triton")
    assert torch.equal(dense[0], exact[0]) == (queries == 20)
    assert not torch.equal(every[0], exact[0])
    packed = [x.transpose(1, 2).reshape(-1, x.shape[1], 64) for x in (q, k, v)]
    cu = [torch.tensor([0, n, 2 * n], device=DEVICE).int() for n in (queries, 400)]
    ends = cu[1].clone()
    ends[1] = 199
    got, want = (
        attention_varlen(*packed, cu[0], ends, queries, 601, config=config, return_lse=True, backend=backend)
        for backend in ("triton", "reference")
    )
    same(got, want)


def test_what_the_kernels_do_not_serve() -> None:
    q, k, v = draw(1, (2, 1), 20, 64, 64)
    for config, reason in (
        (ThriftConfig(base_format="nvfp4", score="oracle"), "score='mean'"),
        (ThriftConfig(base_format="fp8", promoted_storage="nested"), "promoted_storage='16bit'"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            attention(q, k, v, config=config, backend="triton")
    with pytest.raises(NotImplementedError, match="float16 and bfloat16"):
        attention(q.float(), k.float(), v.float(), backend="triton")
    with pytest.raises(NotImplementedError, match="head_dim"):
        attention(q[..., :48], k[..., :48], v[..., :48], config=CONFIG, backend="triton")


@pytest.mark.gpu
def test_graphs_replay_and_auto_takes_the_kernels() -> None:
    torch.manual_seed(2)
    q, k, v = draw(2, (4, 2), 200, 300, 64)
    lengths = torch.tensor([300, 120], device=DEVICE)
    for options in ({}, {"kv_lengths": lengths}):
        for low in FORMATS:
            if low == "e4m3g16":
                continue
            config = ThriftConfig(base_format=low, budget=top_k(2))
            want = attention(q, k, v, config=config, backend="triton", **options)
            assert torch.equal(attention(q, k, v, config=config, **options), want)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = attention(q, k, v, config=config, **options)
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, want)
    assert out.dtype == DTYPE


@pytest.mark.gpu
def test_a_million_tokens() -> None:
    """1,048,576 tokens in one call equal the same queries in pieces: every row chooses and attends by itself."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("takes about 20 GiB of device memory")
    torch.manual_seed(3)
    keys = 1 << 20
    q, k, v = (torch.randn(1, heads, keys, 128, device=DEVICE, dtype=torch.bfloat16) for heads in (8, 1, 1))
    config = ThriftConfig(base_format="fp8", center="block", budget=top_k(16))  # the mean query of a piece is another
    whole, lse = attention(q, k, v, config=config, return_lse=True)
    assert not whole.isnan().any()
    for start, end in ((keys // 2, keys // 2 + 4096), (keys - 65536, keys)):
        part = (q[:, :, start:end], k[:, :, :end], v[:, :, :end])
        out, part_lse = attention(*part, config=config, return_lse=True)
        # The same arithmetic on the same data; a piece may only be cut into programs otherwise.
        torch.testing.assert_close(part_lse, lse[:, :, start:end], rtol=0, atol=1e-3)
        difference = (out.float() - whole[:, :, start:end].float()).norm() / whole[:, :, start:end].float().norm()
        print(f"1M tokens, queries {start} to {end}: relative difference {float(difference):.1e}")
        assert float(difference) < 1e-2
