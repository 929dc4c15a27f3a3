"""Sequences end to end on the reference, and which backend a call gets."""

from __future__ import annotations

import pytest
import torch

from thrift_attn import ThriftConfig, attention, attention_varlen, dispatch, fraction, support, top_k
from thrift_attn.dispatch import check_prefill, pick_backend

CONFIG = ThriftConfig(base_format="nvfp4", budget=fraction(0.4))


def parts(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(95, 4, 32, dtype=dtype),
        torch.randn(230, 2, 32, dtype=dtype),
        torch.randn(230, 2, 32, dtype=dtype),
    )
    return q, k, v, torch.tensor([0, 65, 95]), torch.tensor([0, 130, 230])


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_get_what_they_get_alone(causal: bool) -> None:
    q, k, v, cu_q, cu_k = parts()
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, 65, 130, config=CONFIG, causal=causal, return_lse=True)
    for (q0, q1), (k0, k1) in zip(((0, 65), (65, 95)), ((0, 130), (130, 230)), strict=True):
        alone = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        want, want_lse = attention(*alone, config=CONFIG, causal=causal, return_lse=True)
        torch.testing.assert_close(out[q0:q1], want[0].transpose(0, 1), rtol=0, atol=0)
        torch.testing.assert_close(lse[:, q0:q1], want_lse[0], rtol=0, atol=0)
    assert torch.equal(attention_varlen(q, k, v, cu_q, cu_k, 65, 130, config=CONFIG, causal=causal), out)


def test_few_queries_keep_their_own_lists() -> None:
    """16 queries or fewer are no decode here: each head chooses for itself, as in a longer sequence."""
    q, k, v, _, cu_k = parts()
    cu_q = torch.tensor([0, 5, 70])
    config = ThriftConfig(
        base_format="drop",
        center="none",
        sink_token="none",
        smooth="none",
        scales="max",
        normalize="exact",
        budget=top_k(1),
        force_first=0,
        force_last=0,
    )
    out = attention_varlen(q[:70], k, v, cu_q, cu_k, 65, 130, config=config)
    for rows, positions in (
        (slice(0, 3), (125, 126, 127)),
        (slice(3, 5), (128, 129)),
    ):  # a block of 64 positions ends at 127
        for h in range(4):
            blocks = k[: positions[-1] // 64 * 64 + 64, h // 2][:130].split(64)
            scores = torch.stack([q[rows, h].mean(0) @ block.mean(0) for block in blocks])
            first = int(scores.argmax()) * 64
            for i, position in zip(range(rows.start, rows.stop), positions, strict=True):
                seen = slice(first, min(first + 64, position + 1))
                p = (q[i, h] @ k[seen, h // 2].T / 32**0.5).softmax(-1)
                torch.testing.assert_close(out[i, h], p @ v[seen, h // 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(4, 4)}, ValueError, "3 dimensions"),
        ({"q": None}, TypeError, "tensor"),
        ({"cu_seqlens_q": torch.tensor([0.0, 95.0])}, TypeError, "int32 or int64"),
        ({"cu_seqlens_k": torch.tensor([0, 100, 200, 230])}, ValueError, "B \\+ 1"),
        ({"max_seqlen_q": 0}, ValueError, "max_seqlen_q"),
        ({"max_seqlen_k": 231}, ValueError, "max_seqlen_k"),
        ({"max_seqlen_k": 10**12}, ValueError, "max_seqlen_k"),
        ({"max_seqlen_q": 65.0}, TypeError, "max_seqlen_q must be an int"),
        ({"config": 1}, TypeError, "config must be a ThriftConfig or None, got int"),
        ({"backend": "triton"}, NotImplementedError, "CUDA"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
)
def test_errors_come_first(change: dict, error: type[Exception], words: str) -> None:
    q, k, v, cu_q, cu_k = parts()
    call = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 65, "max_seqlen_k": 130}
    with pytest.raises(error, match=words):
        attention_varlen(**{**call, **change})


def test_backends_on_a_cpu() -> None:
    device = torch.device("cpu")
    assert pick_backend("auto", CONFIG, 64, torch.bfloat16, device, 100) == ("reference", "decoded")
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        check_prefill(CONFIG, 64, torch.bfloat16, device)
    rows = {row.feature: row.status for row in support("cpu")}
    assert rows["attention(), base_format='nvfp4', compute='fp4', backend='triton'"] == "no"
    assert rows["attention(), any option, backend='reference'"] == "emulated"
    told = next(row.why for row in support("cpu") if row.feature == "options with base_format='fp8', compute='fp4'")
    assert "smooth='channel' does nothing with base_format='fp8'" in told


def test_forms_by_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of their own where there are any, else 16-bit products; nested planes are always decoded."""
    device = torch.device("cuda", 0)
    form = {}
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, now=capability: now)
        for low in ("nvfp4", "fp8"):
            form[capability, low] = check_prefill(ThriftConfig(base_format=low), 128, torch.float16, device)
        for low in ("nvfp4", "fp8"):
            assert (
                check_prefill(ThriftConfig(base_format=low, compute="16bit"), 128, torch.float16, device) == "decoded"
            )
        assert (
            check_prefill(ThriftConfig(base_format="nvfp4", promoted_storage="nested"), 128, torch.float16, device)
            == "decoded"
        )
    assert [key for key, found in form.items() if found == "native"] == [
        ((8, 9), "fp8"), ((9, 0), "fp8"), ((10, 0), "nvfp4"), ((10, 0), "fp8"), ((12, 0), "nvfp4"), ((12, 0), "fp8"),
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    with pytest.raises(NotImplementedError, match=r"8\.0 or newer"):
        check_prefill(CONFIG, 128, torch.float16, device)
    for dim, dtype, keys, words in (
        (48, torch.float16, 1, "head_dim"),
        (64, torch.float32, 1, "float16"),
        (64, torch.float16, 2**21, "keys"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            check_prefill(CONFIG, dim, dtype, device, keys)


@pytest.mark.parametrize(
    ("capability", "version", "words"),
    [
        ((9, 0), "3.6.0", None),
        ((9, 0), "3.9.0", None),
        ((9, 0), "3.10.0", "Triton 3.6 to 3.9, got Triton 3.10.0"),
        ((8, 9), "3.6.0", "capability 9.0"),
    ],
)
def test_the_table_says_why_fp8_runs_on_which_kernel(monkeypatch, capability, version, words) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(dispatch, "triton_version", lambda: version)
    row = next(row for row in support(torch.device("cuda", 0)) if "sm_90" in row.feature)
    assert row.status == ("native" if words is None else "no")
    assert words is None or words in row.why
