"""The newest tokens in rings: of any size from 64 tokens on, at any stride, whichever ring belongs to which sequence."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from support.device import DEVICE
from support.engine_layout import in_rings
from support.kernel_caches import make, query, tokens
from support.paged import expected, make_cache, run
from thrift_attn import top_k
from thrift_attn.config import ThriftConfig
from thrift_attn.decode import ops
from thrift_attn.decode.gather import gather_pages


@pytest.mark.parametrize(("tq", "lengths"), [(1, [64 * 3 + 37, 64 + 40]), (3, [64 * 4 + 50, 70])])
def test_attention_reads_blocks_that_wrap(tq: int, lengths: list[int]) -> None:
    cache = make_cache(lengths, 2, 64, ring=73)
    assert any(n // 64 * 64 % 73 + n % 64 > 73 for n in lengths)
    q = (torch.randn(2, 4, tq, 64, generator=torch.Generator().manual_seed(1)) * 2).half().to(DEVICE)
    budget = torch.ones(cache.page_table.shape[1] + 1, dtype=torch.int32, device=DEVICE)
    out, lse, blocks, counts, _, _ = run(cache, q, budget)
    want, want_lse = expected(cache, q, blocks, counts)
    assert (out.cpu().double() - want).norm() < 1e-3 * want.norm()
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=0, atol=3e-3)


@pytest.mark.parametrize(("size", "plane"), [(64 + 9, "nested"), (192, "16bit")])
def test_rings_of_any_size_hold_and_answer_the_same_bits(size: int, plane: str) -> None:
    """Blocks that are packed from a ring, wrapped or not, and tokens that are taken back and come again as others."""
    config = ThriftConfig.for_cache(promoted_storage=plane, budget=top_k(1))
    cache = make("triton", batch=2, heads=1, pages=8, config=config)
    k, v = tokens(200, batch=2, heads=1)
    cache.append(k[:, :, :190], v[:, :, :190], lengths=[190, 60])
    cache.reserve(10)
    plain = cache.tensors()
    found = []
    for tensors in (in_rings(plain, size), plain):
        ops.append(v[:, :, 180:190], k[:, :, 180:190], tensors, cache.numerics)  # both sequences complete a block
        tensors.lengths.sub_(7)
        ops.append(k[:, :, 193:], v[:, :, 193:], tensors, cache.numerics)
        out, lse = ops.attend(query(3, batch=2, heads=2), tensors, cache.numerics, scale=0.125)
        wide = torch.zeros(2, 2, 1, 200, 64, dtype=out.dtype, device=DEVICE)
        gather_pages(wide[0], wide[1], cache=tensors, numerics=cache.numerics, tokens=200)
        assert tensors.lengths.tolist() == [200, 70]
        found.append((out, lse, wide, tensors.base, tensors.high, tensors.k_block_mean, tensors.sink_value))
    for one, other in zip(*found, strict=True):
        assert not one.isnan().any()
        assert torch.equal(one, other)
    assert torch.equal(wide[0][0, :, 193:], k[0, :, 193:])


def test_a_step_leaves_room_for_the_block_that_it_completes() -> None:
    cache = make("triton", heads=1)
    tensors = in_rings(cache.tensors(), 73)
    k, v = tokens(11, heads=1)
    with pytest.raises(ValueError, match="at most 10 tokens to rings of 73, got 11"):
        ops.append(k, v, tensors, cache.numerics)
    with pytest.raises(ValueError, match="R of at least 64"):
        ops.attend(
            query(heads=1), dataclasses.replace(tensors, tail=tensors.tail[:, :, :, :63]), cache.numerics, scale=1.0
        )
