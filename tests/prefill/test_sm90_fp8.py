"""The FP8 prefill kernel of sm_90 against the reference: on the GPU only, since the interpreter does not know Gluon."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from unittest import mock

import pytest
import torch
from torch import Tensor

from thrift_attn.config import BLOCK, ThriftConfig, fraction, top_k
from thrift_attn.dispatch import interpreted
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.prefill.bundles import BlockLists, LogitRules, PrefillOutput, PrefillTensors
from thrift_attn.prefill.pack import PackedKV, PackedQ
from thrift_attn.reference import attention as reference
from thrift_attn.reference.attention import Mask, Planes, _Sequence, build_planes
from thrift_attn.reference.formats import FORMATS, Format
from thrift_attn.reference.quantize import quantise_head

hopper = not interpreted() and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not hopper, reason="needs sm_90")]
E4M3 = torch.float8_e4m3fn
TOP = FORMATS["fp8"].tops[0]
PEAK = math.log2(384 / (1.5 * math.log(2)))


def _blocks_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes and float32 scale of each block of 64 rows of float32 ``[..., T, D]``."""
    x = x.unflatten(-2, (-1, BLOCK))
    scale = x.abs().amax((-2, -1)) / TOP
    safe = torch.where(scale == 0, torch.inf, scale)[..., None, None]
    return (x / safe).to(E4M3).flatten(-3, -2), scale


@dataclass
class Packed:
    q8: Tensor
    q_scale: Tensor
    k8: Tensor
    k_scale: Tensor
    v8: Tensor
    v_scale: Tensor
    centres: Tensor | None
    sink: Tensor | None


def pack(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, centred: bool, sink: bool) -> Packed:
    """The operands of the kernel in plain PyTorch."""
    tq, tk = q.shape[2], k.shape[2]
    lead = (tk - tq if causal else 0) % BLOCK
    q32 = torch.nn.functional.pad(q.float(), (0, 0, lead, -(lead + tq) % BLOCK))
    k32, v32 = (torch.nn.functional.pad(x.float(), (0, 0, 0, -tk % BLOCK)) for x in (k, v))
    real = (torch.arange(k32.shape[2], device=k.device) < tk).unflatten(0, (-1, BLOCK))[..., None]
    blocks = k32.unflatten(2, (-1, BLOCK))
    centres = (blocks.sum(-2) / real.sum(-2)).to(k.dtype)
    logits = None
    if sink:
        centres[:, :, 0] = k[:, :, 0]
        v32[:, :, 0] = 0
        logits = (q32.unflatten(1, (k.shape[1], -1)) @ k32[:, :, None, 0, :, None]).flatten(1, 2)[..., 0].contiguous()
    if centred:
        k32 = torch.where(real, blocks - centres.float()[..., None, :], 0).flatten(2, 3)
    q8, q_scale = _blocks_fp8(q32)
    k8, k_scale = _blocks_fp8(k32)
    values = quantise_head(v32)
    v8, v_scale = values.codes.view(E4M3), values.scales[..., None].repeat(1, 1, blocks.shape[2])
    t = torch.arange(v8.shape[2], device=v.device)
    place = (t & ~15) | (t & 1) | ((t & 8) >> 2) | ((t & 6) << 1)
    turned = torch.empty_like(v8).view(torch.uint8)
    turned[:, :, place] = v8.view(torch.uint8)
    return Packed(
        q8, q_scale, k8, k_scale, turned.mT.contiguous().view(E4M3), v_scale, centres if centred else None, logits
    )


def lists(promoted: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending lists ``[B, H, R, C]`` and counts of bool ``[B, H, R, N]``."""
    counts = promoted.sum(-1).int()
    capacity = max(int(counts.max()), 1)
    order = torch.argsort(~promoted, dim=-1, stable=True)[..., :capacity].int()
    filler = torch.arange(capacity, device=order.device) >= counts[..., None]
    return order.masked_fill(filler, 2**30).contiguous(), counts.contiguous()


def run(q, k, v, promoted, *, causal=True, centred=True, sink=True, scale=None, window=None, softcap=None):
    """The kernel on freshly packed data, outputs poisoned."""
    from thrift_attn.prefill.sm90_fp8.launch import attend_fp8

    p = pack(q, k, v, causal=causal, centred=centred, sink=sink)
    chosen, counts = lists(promoted)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan, device=q.device)
    mean = k.new_empty(0) if p.centres is None else p.centres
    attend_fp8(
        PrefillTensors(q, k, v),
        packed_q=PackedQ(q.new_empty(0), p.q8, p.q_scale, p.sink),
        packed_kv=PackedKV(mean, p.k8, p.k_scale, p.v8, p.v_scale),
        lists=BlockLists(chosen, counts),
        rules=LogitRules(scale or q.shape[-1] ** -0.5, window, softcap),
        into=PrefillOutput(out, lse, lse.new_empty(0)),
        causal=causal,
        centred=centred,
    )
    return out, lse


def coded(p: Tensor, fmt: Format) -> Tensor:
    """P as the kernel rounds it: e4m3 codes linear in log2, their average excess and their sum put right."""
    t = (8 * (p.log2() + PEAK + 7)).round().clamp(min=0)
    value = torch.where(t < 8, t * 2.0**-9, (1 + t % 8 / 8) * (t.div(8, rounding_mode="floor") - 7).exp2())
    return value * (p.sum(-1, keepdim=True) / value.sum(-1, keepdim=True).clamp(min=1e-300))


def expected(q, k, v, config, *, causal=True, scale=None, window=None, softcap=None):
    """float64 reference output, LSE and promoted blocks, P rounded as in the kernel."""
    with mock.patch.object(
        reference, "_round_probabilities", coded if softcap is None else reference._round_probabilities
    ):
        return _expected(q, k, v, config, causal=causal, scale=scale, window=window, softcap=softcap)


def _expected(q, k, v, config, *, causal, scale, window, softcap):
    scale = scale or q.shape[-1] ** -0.5
    outs, lses, chosen = [], [], []
    for b in range(len(q)):
        mask = Mask(q.shape[2], k.shape[2], causal, window)
        numerics = PrefillNumerics.resolve(config)
        planes = build_planes(k[b], v[b], numerics)
        wide = {f.name: getattr(planes, f.name) for f in fields(planes)}
        planes = Planes(**{name: x.double() if isinstance(x, Tensor) else x for name, x in wide.items()})
        sequence = _Sequence(q[b], planes, numerics, mask, scale, softcap)
        out, lse, _ = sequence.attend()
        outs.append(out)
        lses.append(lse)
        chosen.append(sequence.select()[0])
    return torch.stack(outs), torch.stack(lses), torch.stack(chosen)


def inputs(batch, heads, kv_heads, tq, tk, dim, dtype=torch.bfloat16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    q = torch.randn(batch, heads, tq, dim, generator=g, device="cuda")
    k = torch.randn(batch, kv_heads, tk, dim, generator=g, device="cuda")
    k += 2 * torch.randn(batch, kv_heads, 1, dim, generator=g, device="cuda")
    v = torch.randn(batch, kv_heads, tk, dim, generator=g, device="cuda")
    v *= torch.rand(batch, kv_heads, -(-tk // 64), 1, generator=g, device="cuda").repeat_interleave(64, 2)[:, :, :tk]
    return tuple(x.to(dtype) for x in (q, k, v))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def check(q, k, v, config, **options):
    """The kernel does what the reference does: as far from exact attention, and near to it."""
    truth, _, _ = expected(q, k, v, ThriftConfig(base_format="nvfp4", budget=fraction(1)), **options)
    want, want_lse, promoted = expected(q, k, v, config, **options)
    numerics = PrefillNumerics.resolve(config)
    out, lse = run(q, k, v, promoted, centred=numerics.centred, sink=numerics.exact_sink, **options)
    assert out.isfinite().all()
    unavoidable = distance(want, truth)
    # P is rounded with the running maximum in place of the final one, that is on another grid of equal fineness, and the
    # output to 16 bits (2^-9 for bfloat16).
    assert distance(out, truth) <= 1.1 * unavoidable + 2**-8, (distance(out, truth), unavoidable)
    assert distance(out, want) <= unavoidable + 2**-8, (distance(out, want), unavoidable)
    # Sums of half precision and of FP8 products keep 11 bits of their largest term, which Cauchy and Schwarz bound. The LSE
    # is that of the codes: a weight is off by 1.0397 at most (0 to 6.1% less the average excess) and 2^-4 of rounding.
    dim, tk = q.shape[-1], k.shape[2]
    padded = torch.nn.functional.pad(k.float(), (0, 0, 0, -tk % BLOCK)).unflatten(2, (-1, BLOCK))
    centre = padded.mean(-2, keepdim=True) * numerics.centred
    if numerics.exact_sink:
        centre[:, :, 0] = padded[:, :, 0, :1]
    delta = padded - centre
    largest = float(q.float().norm(dim=-1).max() * delta.norm(dim=-1).max()) * (options.get("scale") or dim**-0.5)
    bound = largest * dim / 32 * 2**-11 + math.log(1.0397) + 2**-4 * float(config.budget != fraction(1.0))
    assert (lse - want_lse).abs().max() <= bound, ((lse - want_lse).abs().max(), bound)
    return out, lse


LOW = ThriftConfig(base_format="fp8", budget=fraction(0.0))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("tq", "tk"), [(128, 128), (1, 1), (63, 63), (64, 64), (65, 65), (1000, 1000), (2500, 2500)])
def test_causal_without_promotion(dim, tq, tk) -> None:
    check(*inputs(1, 2, 1, tq, tk, dim), LOW)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("config", [
    ThriftConfig(base_format="fp8", budget=fraction(0.05)),
    ThriftConfig(base_format="fp8", budget=fraction(0.5)),
    ThriftConfig(base_format="fp8", budget=fraction(1.0)),
    ThriftConfig(base_format="fp8", budget=fraction(0.05), sink_token="none", force_first=1),
    ThriftConfig(base_format="fp8", budget=top_k(3), center="none", sink_token="none"),
])  # fmt: skip
def test_promotion(dim, config) -> None:
    check(*inputs(2, 8, 2, 2500, 2500, dim), config)


@pytest.mark.parametrize(("tq", "tk"), [(100, 1000), (65, 4097), (900, 1000), (17, 64)])
def test_chunked(tq, tk) -> None:
    check(*inputs(1, 4, 2, tq, tk, 128, torch.float16), ThriftConfig(base_format="fp8", budget=fraction(0.1)))


@pytest.mark.parametrize(("tq", "tk"), [(300, 1000), (1000, 300), (64, 4160)])
def test_not_causal(tq, tk) -> None:
    check(*inputs(1, 4, 4, tq, tk, 128), ThriftConfig(base_format="fp8", budget=fraction(0.1)), causal=False)


@pytest.mark.parametrize("options", [{"window": 100}, {"window": 700}, {"softcap": 5.0}, {"scale": 0.3}])
def test_options(options) -> None:
    check(*inputs(1, 4, 2, 1500, 1500, 64), ThriftConfig(base_format="fp8", budget=fraction(0.1)), **options)


def test_zero_and_outliers() -> None:
    q, k, v = inputs(1, 2, 1, 700, 700, 128)
    v[:, :, 64:256] = 0
    k[:, :, 128:320] = 0
    q[:, :, 512:] = 0
    v[:, :, 320:384] *= 1e-12
    check(q, k, v, ThriftConfig(base_format="fp8", budget=fraction(0.1)))
    out, lse = run(q, k, torch.zeros_like(v), torch.zeros(1, 2, 11, 11, dtype=torch.bool, device="cuda"))
    assert (out == 0).all()
    assert lse.isfinite().all()


@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_a_nan_stays_visible(what) -> None:
    """One NaN in Q spoils its block of queries, one in K those that see its block, one in V the head."""
    tensors = dict(zip("qkv", inputs(1, 2, 1, 700, 700, 128), strict=True))
    tensors[what][0, 0, 300, 5] = torch.nan
    out, _ = run(*tensors.values(), torch.zeros(1, 2, 11, 11, dtype=torch.bool, device="cuda"))
    spoiled = {"q": slice(256, 320), "k": slice(320, None), "v": slice(None)}[what]
    assert out[0, 0, spoiled].isnan().all()
    if what != "v":
        assert out[0, :, :256].isfinite().all()


def test_strided_inputs() -> None:
    q, k, v = inputs(1, 4, 2, 500, 500, 128)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    config = ThriftConfig(base_format="fp8", budget=fraction(0.1))
    assert torch.equal(check(q, k, v, config)[0], check(*turned, config)[0])


def plain_fp8(q, k, v):
    """Causal attention with one e4m3 scale per head for each of Q, K and V and P times 256 in e4m3: float64."""

    def rounded(x):
        scale = x.double().abs().amax((-2, -1), keepdim=True) / 448
        return (x.double() / scale).to(E4M3).double() * scale

    q, k, v = (rounded(x) for x in (q, k, v))
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(torch.ones_like(q @ k.mT).triu(1).bool(), -torch.inf)
    p = (s - s.amax(-1, keepdim=True)).exp()
    return (p * 256).to(E4M3).double() / 256 @ v / p.sum(-1, keepdim=True)


@pytest.mark.parametrize(("outliers", "share"), [(False, 1.0), (True, 0.5)])
def test_error_against_plain_fp8(outliers, share) -> None:
    g = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn(1, 2, 4096, 128, generator=g, device="cuda") for _ in range(3))
    if outliers:  # a few channels of K carry a large value, as in models with a bias
        k[..., [3, 40, 77, 100]] += 30
    q, k, v = (x.bfloat16() for x in (q, k, v))
    truth, _, _ = expected(q, k, v, ThriftConfig(base_format="nvfp4", budget=fraction(1)))
    _, _, promoted = expected(q, k, v, ThriftConfig(base_format="fp8", budget=fraction(0.05)))
    ours, plain = distance(run(q, k, v, promoted)[0], truth), distance(plain_fp8(q, k, v), truth)
    print("error", outliers, ours, plain)
    assert ours <= share * plain, (ours, plain)
