"""Pages as an engine has them: each head of a page one record in a buffer that also holds other things, at any stride."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from support.device import DEVICE
from support.engine_layout import in_records
from support.kernel_caches import make, query, tokens
from thrift_attn import top_k
from thrift_attn.config import ThriftConfig
from thrift_attn.decode import ops
from thrift_attn.decode.gather import gather_pages
from thrift_attn.decode.pack import pack_blocks

REFUSED = r"base must be contiguous.* multiples of 16 bytes"


@pytest.mark.parametrize(
    "config",
    [
        ThriftConfig.for_cache(budget=top_k(1)),
        ThriftConfig.for_cache(budget=top_k(1), promoted_storage="nested8"),
        ThriftConfig.for_cache(budget=top_k(1), promoted_storage="16bit", base_format="mxfp4"),
    ],
    ids=["nested", "nested8", "16bit"],
)
def test_records_hold_and_answer_the_same_bits(config: ThriftConfig) -> None:
    """Steps that pack a block, attention and what is read, over records and over planes of their own."""
    cache = make("triton", batch=2, config=config, pages=6)
    k, v = tokens(130, batch=2)
    cache.append(k[:, :, :126], v[:, :, :126], lengths=[126, 10])
    cache.reserve(4)
    plain = cache.tensors()
    records, behind = in_records(plain)
    alone = {name: getattr(plain, name).clone() for name in ("tail", "lengths", "overrun", "block0_mean", "sink_value")}
    records = dataclasses.replace(records, **alone)
    found = []
    for tensors in (plain, records):
        ops.append(k[:, :, 126:], v[:, :, 126:], tensors, cache.numerics)
        out, lse = ops.attend(query(3, batch=2), tensors, cache.numerics, scale=0.125)
        wide = torch.zeros(2, 2, 2, 130, 64, dtype=out.dtype, device=DEVICE)
        gather_pages(wide[0], wide[1], cache=tensors, numerics=cache.numerics, tokens=130)
        found.append((out, lse, wide, tensors.base, tensors.high, tensors.k_block_mean))
    assert not found[0][0].isnan().any()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert (behind == 0x5A).all()
    assert not records.base.is_contiguous()


def test_pages_that_do_not_begin_at_16_bytes_are_refused() -> None:
    cache = make("triton", heads=2)
    k, v = tokens(64, heads=2)
    cache.append(k, v)
    tensors = cache.tensors()
    buffer = torch.zeros(24, 2, tensors.base.shape[2] + 2, dtype=torch.int32, device=DEVICE)
    shifted = torch.zeros(tensors.base.numel() + 1, dtype=torch.int32, device=DEVICE)[1:].view_as(tensors.base)
    for base in (buffer[..., :-2], shifted):
        wrong = dataclasses.replace(tensors, base=base)
        pages = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        with pytest.raises(ValueError, match=REFUSED):
            pack_blocks(k, v, pages, cache=wrong, numerics=cache.numerics)
        with pytest.raises(ValueError, match=REFUSED):
            ops.attend(query(), wrong, cache.numerics, scale=0.125)
        with pytest.raises(ValueError, match=REFUSED):
            gather_pages(k.clone(), v.clone(), cache=wrong, numerics=cache.numerics, tokens=64)
