"""Quantised prefill data hold exactly the reference's codes and scales, in every form and layout."""

from __future__ import annotations

import pytest
import torch

from support.device import DEVICE
from thrift_attn.config import BLOCK
from thrift_attn.kernels.token_order import position_of
from thrift_attn.prefill.bundles import KernelNumerics
from thrift_attn.prefill.pack import PackedKV, quantise_kv, quantise_q
from thrift_attn.prefill.statistics import NO_STATISTICS
from thrift_attn.reference.channel_scales import CallStatistics
from thrift_attn.reference.formats import FORMATS, RESIDUALS, Format
from thrift_attn.reference.quantize import (
    Quantised,
    block_means,
    decode_elements,
    dequantise,
    mean_of_others,
    pack_e2m1,
    quantise_head,
    residual,
)
from thrift_attn.reference.quantize import quantise as quantise_here
from thrift_attn.seq_layout import dense, packed, padded

DTYPE = torch.float16
DEV = torch.device(DEVICE)


def quantise(x: torch.Tensor, fmt: Format, dim: int = -1, *, best: bool = False) -> Quantised:
    """The reference on the CPU: on CUDA PyTorch divides by a number as if by multiplying with its inverse."""
    return Quantised(*(part.to(x.device) for part in quantise_here(x.cpu(), fmt, dim, best=best)))


def quantise_values(x: torch.Tensor) -> Quantised:
    return Quantised(*(part.to(x.device) for part in quantise_head(x.cpu())))


def draw(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, device=DEVICE) * torch.logspace(-2, 1, shape[-1], device=DEVICE)
    return (x + 3 * torch.randn(shape[1], 1, shape[-1], device=DEVICE)).to(DTYPE)


def options(
    low: str | None, form: str, *, rest: str | None = None, centred: bool = True, sink: bool = False, best: bool = True
) -> KernelNumerics:
    """Options of the kernels; without a format Q is not quantised."""
    return KernelNumerics(
        base_format=low or "nvfp4", form=form, residual=rest, quantise_qp=low is not None, centred=centred, exact_sink=sink,
        subtract_query_mean=False, channel_scales=False, v_head_scales=False, normalize_rounded=False, best_scales=best,
        force_first=0, force_last=0,
    )  # fmt: skip


def padded_blocks(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[-2] % BLOCK))


def same(got: torch.Tensor, want: torch.Tensor, best: bool) -> None:
    """Equal; errors of two scales that differ by the order of a sum may be ranked either way."""
    assert got.shape == want.shape
    assert (got != want).float().mean() <= (1e-3 if best else 0)


def _rest(x: torch.Tensor, base: torch.Tensor, plane: Format, dim: int) -> torch.Tensor:
    return residual(x.cpu(), base.cpu().float(), plane, dim, best=True).to(DEVICE)


def check_kv(
    got: PackedKV,
    k,
    v,
    low: str,
    form: str,
    *,
    centred=True,
    sink=False,
    best=False,
    rest=None,
    statistics=NO_STATISTICS,
) -> None:
    """Compare the planes of whole tensors [B, Hkv, T, D] with the reference's."""
    fmt, blocks = FORMATS[low], got.k_block_mean.shape[2]
    want = block_means(k)
    if sink:
        want[:, :, 0], v = k[:, :, 0], v.clone()
        v[:, :, 0] = 0
        assert torch.equal(got.k_block_mean[:, :, 0], want[:, :, 0])
        torch.testing.assert_close(got.block0_mean, mean_of_others(k), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(got.k_block_mean, want, rtol=1e-3, atol=1e-6)
    # A mean that rounds the other way changes the codes, so they are compared on the kernel's own means.
    mean = got.k_block_mean.float().repeat_interleave(BLOCK, -2)[..., : k.shape[-2], :] if centred else 0
    of_k = 1 if statistics[1] is None else statistics[1][:, :, None]
    of_v = 1 if statistics[2] is None else statistics[2][:, :, None, None]
    delta, v = padded_blocks(k.float() - mean) * of_k, padded_blocks(v.float()) * of_v
    a = quantise(delta, fmt, -1, best=best)
    b = quantise_values(v) if fmt.group is None else quantise(v, fmt, -2, best=best)
    if form == "decoded":
        if fmt.group is None:
            decoded = decode_elements(a.codes, fmt), decode_elements(b.codes, fmt)
            assert torch.equal(got.k_scale, a.scales)
            assert torch.equal(got.v_scale, b.scales[..., None].expand(-1, -1, blocks))
        else:
            decoded = dequantise(a, fmt, -1), dequantise(b, fmt, -2)
        same(got.k.float() * of_k, decoded[0], best)
        same(got.v.float() * of_v, decoded[1], best)
        if rest is not None:
            plane = RESIDUALS[rest]
            same(got.k_residual.float() * of_k, _rest(delta, got.k * of_k, plane, -1), best)
            same(got.v_residual.float() * of_v, _rest(v, got.v * of_v, plane, -2), best)
        return
    if fmt.group is None:
        assert torch.equal(got.k.view(torch.uint8), a.codes)
        at = position_of(blocks * BLOCK).to(DEVICE)
        assert torch.equal(got.v.view(torch.uint8)[..., at], b.codes.mT)
        assert torch.equal(got.k_scale, a.scales)
        assert torch.equal(got.v_scale, b.scales[..., None].expand(-1, -1, blocks))
        return
    same(got.k, pack_e2m1(a.codes), best)
    same(got.k_scale, a.scales, best)
    same(got.v, pack_e2m1(b.codes.mT.contiguous()), best)
    same(got.v_scale, b.scales.mT, best)


@pytest.mark.parametrize(
    ("low", "form", "dim", "best"),
    [
        ("fp8", "native", 64, True),
        ("fp8", "native", 128, True),
        ("fp8", "decoded", 80, True),
        ("nvfp4", "decoded", 80, True),
        ("nvfp4", "native", 128, False),
        ("nvfp4", "native", 64, True),
        ("mxfp4", "decoded", 64, True),
        ("mxfp4", "native", 128, True),
        ("nvfp4", "decoded", 256, False),
    ],
)
def test_keys_and_values_equal_the_reference(low: str, form: str, dim: int, best: bool) -> None:
    torch.manual_seed(dim)
    tokens = 1 if dim == 80 else 64 if dim == 256 else 129
    k, v = draw(2, 2, tokens, dim), draw(2, 2, tokens, dim)
    k[0, 0, :16, :32] = 0
    v[1, 1, :32, 3] = 0
    k[1, 0], v[0, 1] = 0, 0  # whole heads
    layout = dense(2, tokens, tokens, True, DEV)
    got = quantise_kv(k, v, layout=layout, numerics=options(low=low, form=form, best=best))
    check_kv(got, k, v, low, form, best=best)


def powers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 8, shape, device=DEVICE).float().exp2()


@pytest.mark.parametrize(
    ("low", "form", "dim", "rest"),
    [
        ("nvfp4", "decoded", 80, "nested"),
        ("nvfp4", "native", 64, None),
        ("mxfp4", "decoded", 64, "nested8"),
        ("mxfp4", "native", 96, None),
    ],
)
def test_powers_of_two(low: str, form: str, dim: int, rest: str | None) -> None:
    """Native data are those of K, V and Q times powers of two; from decoded data the powers are gone again."""
    torch.manual_seed(dim)
    q, k, v = draw(2, 4, 70, dim), draw(2, 2, 70, dim), draw(2, 2, 70, dim)
    statistics = CallStatistics(None, powers(2, 2, dim), powers(2, 2) if low == "nvfp4" else None)
    layout = dense(2, 70, 70, True, DEV)
    got = quantise_kv(k, v, layout=layout, numerics=options(low=low, form=form, rest=rest), statistics=statistics)
    check_kv(got, k, v, low, form, best=True, rest=rest, statistics=statistics)
    of_q = 1 / statistics[1].repeat_interleave(2, 1)[:, :, None]
    want = quantise(padded_blocks(q.float()) * of_q, FORMATS[low], best=True)
    found = quantise_q(q, layout=layout, numerics=options(low=low, form=form), statistics=statistics)
    if form == "decoded":
        same(found.q.float() * of_q, dequantise(want, FORMATS[low]), True)
    else:
        same(found.q, pack_e2m1(want.codes), True)
        same(found.q_scale, want.scales, True)


@pytest.mark.parametrize(
    ("low", "form", "tokens", "rest"),
    [
        ("fp8", "native", 70, None),
        ("nvfp4", "decoded", 130, "nested"),
        ("mxfp4", "native", 1, None),
        ("nvfp4", "decoded", 2, None),
    ],
)
def test_the_first_token_is_left_out(low: str, form: str, tokens: int, rest: str | None) -> None:
    """It is the centre of its block, its value is in no group, and the others have a mean of their own."""
    torch.manual_seed(tokens)
    k, v = draw(2, 2, tokens, 64), draw(2, 2, tokens, 64)
    k[:, :, 0] *= 10
    v[:, :, 0] *= 100
    layout = dense(2, tokens, tokens, True, DEV)
    got = quantise_kv(k, v, layout=layout, numerics=options(low=low, form=form, rest=rest, sink=True))
    check_kv(got, k, v, low, form, sink=True, best=True, rest=rest)


@pytest.mark.parametrize("low", ["nvfp4", None])
def test_logits_of_the_first_token(low: str | None) -> None:
    """Of every sequence its own, end to end, exact whatever Q is rounded to."""
    torch.manual_seed(4)
    lengths = [(65, 130), (1, 64), (40, 30)]
    cu = [torch.tensor([0, *x], device=DEVICE, dtype=torch.int32).cumsum(0).int() for x in zip(*lengths, strict=True)]
    every = packed(*cu, queries=106, keys=224, max_queries=65, max_keys=130, causal=True)
    q, k = draw(1, 4, 106, 64), draw(1, 2, 224, 64)
    packed_k = quantise_kv(k, k, layout=every, numerics=options(low="nvfp4", form="decoded", sink=True))
    statistics = CallStatistics(None, powers(3, 2, 64)) if low else NO_STATISTICS
    found = quantise_q(
        q,
        layout=every,
        numerics=options(low=low, form="decoded", sink=True),
        statistics=statistics,
        k_block_mean=packed_k.k_block_mean,
    ).sink_logits
    for b, (queries, keys) in enumerate(lengths):
        q0, k0, row = (int(every.spans[b, i]) for i in (0, 2, 4))
        hidden, at = max(0, queries - keys), row * BLOCK + (keys - queries) % BLOCK
        want = (q[0, :, q0 : q0 + queries].float() * k[0, :, k0].float().repeat_interleave(2, 0)[:, None]).sum(-1)
        got = found[0, :, at + hidden : at + queries]
        torch.testing.assert_close(got, want[:, hidden:], rtol=1e-5, atol=1e-3)
        mean = mean_of_others(k[0, :, k0 : k0 + keys])
        torch.testing.assert_close(packed_k.block0_mean[b], mean, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rest", ["nested", "nested8"])
def test_residual_planes(rest: str) -> None:
    torch.manual_seed(1)
    k, v = draw(1, 2, 70, 64), draw(1, 2, 70, 64)
    got = quantise_kv(
        k,
        v,
        layout=dense(1, 70, 70, True, DEV),
        numerics=options(low="nvfp4", form="decoded", rest=rest, centred=False),
    )
    check_kv(got, k, v, "nvfp4", "decoded", centred=False, best=True, rest=rest)


def test_faults_stay_visible() -> None:
    torch.manual_seed(2)
    k, v = draw(1, 1, 64, 64), draw(1, 1, 64, 64)
    k[0, 0, 3, 20], v[0, 0, 40, 7] = torch.nan, torch.inf
    layout = dense(1, 64, 64, True, DEV)
    got = quantise_kv(k, v, layout=layout, numerics=options(low="nvfp4", form="decoded", centred=False))
    assert got.k[0, 0, 3, 16:32].isnan().all()
    assert int(got.k.isnan().sum()) == 16
    assert got.v[0, 0, 32:48, 7].isnan().all()
    assert int(got.v.isnan().sum()) == 16
    got = quantise_kv(k, v, layout=layout, numerics=options(low="fp8", form="native", centred=False))
    assert got.k_scale.isnan().all()
    assert got.v_scale.isnan().all()


@pytest.mark.parametrize(
    ("low", "form", "queries", "keys"),
    [
        ("fp8", "native", 70, 200),
        ("fp8", "decoded", 65, 65),
        ("nvfp4", "decoded", 70, 100),
        ("mxfp4", "native", 100, 60),
    ],
)
def test_queries_equal_the_reference(low: str, form: str, queries: int, keys: int) -> None:
    torch.manual_seed(queries)
    q, fmt = draw(2, 3, queries, 64), FORMATS[low]
    layout = dense(2, queries, keys, True, DEV)
    got = quantise_q(q, layout=layout, numerics=options(low=low, form=form))
    lead = (keys - queries) % BLOCK
    rows = padded_blocks(torch.nn.functional.pad(q.float(), (0, 0, lead, 0)))
    seen = torch.zeros(rows.shape[-2], dtype=torch.bool, device=DEVICE)
    seen[lead + max(0, queries - keys) : lead + queries] = True
    rows = torch.where(seen[:, None], rows, 0)
    sizes = seen.view(-1, BLOCK).sum(-1).clamp(min=1)
    torch.testing.assert_close(
        got.q_block_mean, rows.unflatten(-2, (-1, BLOCK)).sum(-2) / sizes[:, None], rtol=1e-5, atol=1e-5
    )
    want = quantise(rows, fmt, best=True)
    if fmt.group is None:
        assert torch.equal(got.q_scale, want.scales)
        codes = got.q.view(torch.uint8) if form == "native" else got.q.float()
        assert torch.equal(codes, want.codes if form == "native" else decode_elements(want.codes, fmt))
    elif form == "decoded":
        same(got.q.float(), dequantise(want, fmt), True)
    else:
        same(got.q, pack_e2m1(want.codes), True)
        same(got.q_scale, want.scales, True)


def test_sequences_end_to_end_and_padded() -> None:
    """Every sequence gets what it gets alone, wherever it lies; inputs are strided views."""
    torch.manual_seed(3)
    lengths = [(65, 130), (1, 64), (40, 30)]
    q, k, v = (draw(1, 200, 2, 64).transpose(1, 2) for _ in range(3))
    cu = [torch.tensor([0, *x], device=DEVICE, dtype=torch.int32).cumsum(0).int() for x in zip(*lengths, strict=True)]
    every = packed(*cu, queries=106, keys=224, max_queries=65, max_keys=130, causal=True)
    k, v = (torch.cat([x, x[:, :, :24]], 2).transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    kv = quantise_kv(k, v, layout=every, numerics=options(low="fp8", form="native"))
    qp = quantise_q(q[:, :, :106], layout=every, numerics=options(low="fp8", form="native"))
    for b, (queries, keys) in enumerate(lengths):
        q0, k0, row, block = (int(every.spans[b, i]) for i in (0, 2, 4, 5))
        alone = dense(1, queries, keys, True, DEV)
        one = quantise_kv(
            k[:, :, k0 : k0 + keys], v[:, :, k0 : k0 + keys], layout=alone, numerics=options(low="fp8", form="native")
        )
        n = alone.blocks
        assert torch.equal(kv.k_block_mean[:, :, block : block + n], one.k_block_mean)
        assert torch.equal(kv.k_scale[:, :, block : block + n], one.k_scale)
        tokens = slice(block * BLOCK, (block + n) * BLOCK)
        assert torch.equal(kv.k.view(torch.uint8)[:, :, tokens], one.k.view(torch.uint8))
        assert torch.equal(kv.v.view(torch.uint8)[..., tokens], one.v.view(torch.uint8))
        mine = quantise_q(q[:, :, q0 : q0 + queries], layout=alone, numerics=options(low="fp8", form="native"))
        assert torch.equal(qp.q_block_mean[:, :, row : row + alone.q_blocks], mine.q_block_mean)
        assert torch.equal(qp.q_scale[:, :, row : row + alone.q_blocks], mine.q_scale)
    ragged = padded(65, 130, True, torch.tensor([130, 7], device=DEVICE))
    assert ragged.spans.tolist() == [[0, 65, 0, 130, 0, 0], [0, 65, 0, 7, 0, 0]]
    both = quantise_q(torch.cat([q[:, :, :65]] * 2), layout=ragged, numerics=options(low="fp8", form="decoded"))
    alone = quantise_q(q[:, :, :65], layout=dense(1, 65, 7, True, DEV), numerics=options(low="fp8", form="decoded"))
    rows = alone.q_block_mean.shape[2]
    assert torch.equal(both.q_block_mean[1:, :, :rows], alone.q_block_mean)


def test_errors() -> None:
    k = draw(1, 1, 64, 80)
    layout = dense(1, 64, 64, True, DEV)
    with pytest.raises(ValueError, match="multiple of 32"):
        quantise_kv(k, k, layout=layout, numerics=options(low="mxfp4", form="decoded"))
    with pytest.raises(NotImplementedError, match="nested"):
        quantise_kv(k, k, layout=layout, numerics=options(low="nvfp4", form="native", rest="nested"))
    with pytest.raises(ValueError, match="scales of V"):
        quantise_kv(
            k,
            k,
            layout=layout,
            numerics=options(low="nvfp4", form="decoded"),
            statistics=CallStatistics(None, powers(1, 1, 80)),
        )
    with pytest.raises(ValueError, match="form"):
        quantise_q(k, layout=layout, numerics=options(low="nvfp4", form="packed"))
