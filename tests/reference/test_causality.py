"""What later tokens of a call may change: nothing where a configuration does not look ahead, noise where it says so."""

from __future__ import annotations

import pytest
import torch

from thrift_attn import ThriftConfig, attention, top_k
from thrift_attn.numerics import PrefillNumerics

CONFIGS = {
    "default": ThriftConfig(base_format="nvfp4", budget=top_k(1)),
    "block means": ThriftConfig(base_format="nvfp4", center="block", smooth="none", budget=top_k(1)),
    "paper": ThriftConfig.paper(budget=top_k(1)),
    "16-bit math": ThriftConfig(base_format="nvfp4", compute="16bit", smooth="none", budget=top_k(1)),
    "fp8": ThriftConfig(base_format="fp8", budget=top_k(1)),
    "sparse": ThriftConfig.sparse("quest", budget=top_k(1)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_depends_on_later_ones_only_where_that_is_said(name: str) -> None:
    """The first 256 tokens alone, and before 128 others of another size."""
    config = CONFIGS[name]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 384, 32, generator=draw) for _ in range(3))
    for x in (q, k, v):
        x[:, :, 256:] = 5 + 20 * x[:, :, 256:]
    whole = attention(q, k, v, config=config)[:, :, :256]
    alone = attention(q[:, :, :256], k[:, :, :256], v[:, :, :256], config=config)
    same = (whole - alone).abs().max() <= 1e-6
    assert bool(same) == (not PrefillNumerics.resolve(config).looks_ahead)
    assert (whole - alone).norm() < 0.5 * alone.norm()
