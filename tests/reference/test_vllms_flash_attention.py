"""FlashAttention-3 as vLLM brings it, which takes packed sequences: exact attention in a process of vLLM."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from thrift_attn import exact


def varlen(
    q: Tensor, k: Tensor, v: Tensor, *, max_seqlen_q: int, cu_seqlens_q: Tensor, max_seqlen_k: int,
    cu_seqlens_k: Tensor, softmax_scale: float, causal: bool, softcap: float, return_softmax_lse: bool, fa_version: int,
) -> Any:  # fmt: skip
    """As vLLM's function of that name: ``[tokens, H, D]``, the log-sum-exp ``[H, tokens]``."""
    assert fa_version == 3
    assert not softcap
    outs, sums = [], []
    for row in range(len(cu_seqlens_q) - 1):
        a, b = (slice(*starts[row : row + 2].tolist()) for starts in (cu_seqlens_q, cu_seqlens_k))
        assert (a.stop - a.start, b.stop - b.start) == (max_seqlen_q, max_seqlen_k)
        group = q.shape[1] // k.shape[1]
        logits = torch.einsum("thd,shd->hts", q[a], k[b].repeat_interleave(group, 1)) * softmax_scale
        if causal:
            seen = torch.ones(max_seqlen_q, max_seqlen_k, dtype=torch.bool).tril(max_seqlen_k - max_seqlen_q)
            logits = logits.where(seen, -torch.inf)
        outs.append(torch.einsum("hts,shd->thd", logits.softmax(-1), v[b].repeat_interleave(group, 1)))
        sums.append(logits.logsumexp(-1))
    return (torch.cat(outs), torch.cat(sums, 1)) if return_softmax_lse else torch.cat(outs)


@pytest.fixture
def in_vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = SimpleNamespace(flash_attn_varlen_func=varlen, is_fa_version_supported=lambda version: version == 3)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(vllm_flash_attn=found))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", found)
    monkeypatch.setattr(exact.importlib.util, "find_spec", lambda name: None)
    exact.fa3.cache_clear()
    yield found
    exact.fa3.cache_clear()


@pytest.mark.parametrize("causal", [True, False])
def test_it_attends_a_later_part_of_prompts_and_tells_its_sums(in_vllm: Any, causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, generator=g) for heads, n in ((4, 5), (2, 9), (2, 9)))
    options: dict[str, Any] = {"causal": causal, "scale": 0.25}
    out, lse = exact.attend_exact(q, k, v, **options, lse=True, by="FlashAttention-3")
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    seen = torch.ones(5, 9, dtype=torch.bool).tril(4) if causal else torch.ones(5, 9, dtype=torch.bool)
    logits = (q @ wide[0].mT * 0.25).where(seen, -torch.inf)
    assert lse is not None
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, logits.softmax(-1) @ wide[1])
    alone, nothing = exact.attend_exact(q, k, v, **options, by="FlashAttention-3")
    assert nothing is None
    torch.testing.assert_close(alone, out)


def test_a_vllm_without_it_is_no_help(in_vllm: Any) -> None:
    in_vllm.is_fa_version_supported = lambda version: False
    assert exact.fa3() is None


def test_vllm_is_not_imported_for_it(in_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm")
    assert exact.fa3() is None
