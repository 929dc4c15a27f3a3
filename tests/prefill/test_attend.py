"""The fused prefill kernels against the reference: every format, arithmetic and mask, odd lengths, poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from support.device import DEVICE
from support.prefill import DTYPE, EPS, check, draw, error
from thrift_attn.combine import merge
from thrift_attn.config import ThriftConfig, fraction, top_k
from thrift_attn.numerics import PrefillNumerics
from thrift_attn.prefill import attend as kernels
from thrift_attn.prefill.bundles import KernelNumerics
from thrift_attn.prefill.ops import prefill, prefill_op
from thrift_attn.seq_layout import SeqLayout, dense, packed, padded


@pytest.mark.parametrize(
    ("low", "math_", "dim", "queries", "keys", "options"),
    [
        ("nvfp4", "fp4", 64, 66, 130, {}),
        ("mxfp4", "fp4", 96, 65, 65, {"softcap": 5.0}),
        ("fp8", "fp4", 80, 65, 130, {}),
        ("nvfp4", "16bit", 64, 64, 129, {"window": 100}),
        ("nvfp4", "fp4", 64, 130, 300, {"window": 70}),
        ("nvfp4", "16bit", 80, 65, 100, {"causal": False, "softcap": 5.0}),
        ("mxfp4", "16bit", 128, 63, 63, {}),
        ("fp8", "16bit", 64, 100, 60, {}),
        ("nvfp4", "16bit", 256, 17, 80, {}),
        ("nvfp4", "fp4", 64, 65, 100, {"causal": False, "center": "none", "sink_token": "none", "normalize": "exact"}),
        ("mxfp4", "fp4", 64, 100, 65, {"center": "block", "normalize": "exact"}),
        ("nvfp4", "fp4", 64, 65, 130, {"sink_token": "none", "force_first": 1}),
        ("nvfp4", "fp4", 64, 1, 1, {}),
        ("fp8", "fp4", 64, 130, 130, {"window": 40}),
    ],
)
def test_kernel_equals_the_reference(low: str, math_: str, dim: int, queries: int, keys: int, options: dict) -> None:
    torch.manual_seed(keys)
    ours = {
        name: value for name, value in options.items() if name in ("center", "sink_token", "normalize", "force_first")
    }
    config = ThriftConfig(base_format=low, compute=math_, budget=fraction(0.4), **ours)
    rest = {name: value for name, value in options.items() if name not in ours}
    q, k, v = draw(2 if queries == 66 else 1, (4, 2) if queries == 66 else (2, 1), queries, keys, dim)
    check(q, k, v, config, **rest)


@pytest.mark.parametrize("high", ["nested", "nested8"])
def test_nested_planes(high: str) -> None:
    torch.manual_seed(1)
    check(
        *draw(1, (2, 1), 70, 150, 64),
        ThriftConfig(base_format="nvfp4", compute="16bit", promoted_storage=high, budget=fraction(0.5)),
    )


@pytest.mark.parametrize(
    ("queries", "options"),
    [(70, {}), (65, {"compute": "16bit", "promoted_storage": "nested"}), (70, {"base_format": "mxfp4"}), (3, {})],
)
def test_levelled_data(queries: int, options: dict) -> None:
    """Outlier channels, tiny K and V: both sides take the same powers of two, and little is lost."""
    torch.manual_seed(11)
    q, k, v = draw(1, (4, 2), queries, 150, 64)
    size = torch.ones(64, device=DEVICE)
    size[[3, 40]] = 20
    q, k, v = (10 * q / size).to(DTYPE), (0.02 * k * size).to(DTYPE), (1e-3 * v).to(DTYPE)
    config = ThriftConfig(**{"base_format": "nvfp4", "smooth": "channel", "budget": fraction(0.4), **options})
    check(q, k, v, config)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_of_the_budget(share: float) -> None:
    torch.manual_seed(2)
    q, k, v = draw(1, (2, 1), 65, 130, 64)
    config = ThriftConfig(base_format="nvfp4", budget=fraction(share))
    check(q, k, v, config)
    if share == 1.0:
        out = prefill(q, k, v, dense(1, 65, 130, True, q.device), config, "decoded", scale=0.125)[0]
        hidden = torch.ones(65, 130, dtype=torch.bool, device=DEVICE).triu(66)
        logits = (q.double() @ k.double().mT * 0.125).masked_fill(hidden, -torch.inf)
        assert error(out, logits.softmax(-1) @ v.double()) < 2 * EPS


def test_two_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of 128 queries with two lists, half blocks, and half of the output."""
    monkeypatch.setattr(kernels, "tuning", lambda *_: kernels.Tuning(128, 32, 4, 1, columns=32))
    torch.manual_seed(9)
    check(*draw(1, (2, 1), 130, 160, 64), ThriftConfig(base_format="nvfp4", budget=fraction(0.4)))


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 200])
def test_more_blocks_than_one_product_of_centres(window: int | None) -> None:
    """At head dim 64 a product of centres is of 8 blocks; with the window it starts within one."""
    torch.manual_seed(12)
    check(*draw(1, (2, 1), 70, 650, 64), ThriftConfig(base_format="nvfp4", budget=fraction(0.2)), window=window)


def test_zeros_in_fp8_have_no_scale() -> None:
    """Logits of 0 and of what is hidden stay apart where the scale of Q or K is 0."""
    torch.manual_seed(13)
    q, k, v = draw(1, (1, 1), 70, 70, 64)
    config = ThriftConfig(base_format="fp8", budget=fraction(0.0), center="none", sink_token="none", force_last=0)
    sequences = dense(1, 70, 70, True, q.device)
    for x, y in ((q * 0, k), (q, k * 0)):
        out = prefill(x, y, v, sequences, config, "decoded", scale=0.1)[0]
        want = v.double().cumsum(2) / torch.arange(1, 71, device=v.device)[:, None]
        assert error(out, want) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize(("low", "dim"), [("fp8", 96), ("mxfp4", 64), ("mxfp4", 128)])
def test_native_products_equal_emulated_ones(low: str, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same codes through narrow units (mxfp4 by the compiler's own emulation where there are none) and as 16-bit data."""
    if low == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 units")
    if low == "mxfp4" and torch.cuda.get_device_capability()[0] == 9:  # with eight warps Triton 3.6 emulates it wrongly
        monkeypatch.setattr(kernels, "tuning", lambda *_: kernels.Tuning(64, 64, 4, 1))
    torch.manual_seed(10)
    q, k, v = draw(2, (4, 2), 300, 1000, dim)
    sequences, config = dense(2, 300, 1000, True, q.device), ThriftConfig(base_format=low, budget=0.05)
    native, decoded = (prefill(q, k, v, sequences, config, form, scale=0.1) for form in ("native", "decoded"))
    # FP8 units keep about 14 bits of a sum, so logits of size 10 move by 1e-3 and with them which way P rounds (1/16).
    assert error(native[0], decoded[0].double()) < 2e-2
    torch.testing.assert_close(native[1], decoded[1], rtol=0, atol=2e-2)


def test_sparse_baseline_drops_what_is_not_chosen() -> None:
    torch.manual_seed(3)
    check(*draw(1, (2, 1), 130, 200, 64), ThriftConfig.sparse("mean", budget=top_k(2)))


@pytest.mark.parametrize("queries", [1, 16])
def test_few_queries_share_a_list(queries: int) -> None:
    torch.manual_seed(4)
    q, k, v = draw(1, (4, 2), queries, 300, 64)
    check(q, k, v, ThriftConfig(base_format="nvfp4", compute="16bit", budget=top_k(2)))


def test_chunks_equal_the_whole() -> None:
    """Rows are cut at absolute positions, so a prompt may come in any pieces."""
    torch.manual_seed(5)
    q, k, v = draw(1, (2, 1), 150, 150, 64)
    config, scale = ThriftConfig(base_format="nvfp4", compute="16bit", smooth="none", budget=top_k(2)), 0.125
    whole = prefill(q, k, v, dense(1, 150, 150, True, q.device), config, "decoded", scale=scale)
    for start, end in ((64, 128), (128, 150)):
        part = dense(1, end - start, end, True, q.device)
        out, lse, *_ = prefill(q[:, :, start:end], k[:, :, :end], v[:, :, :end], part, config, "decoded", scale=scale)
        # The mean query and the block means are those of whole blocks only when the piece ends at a boundary.
        torch.testing.assert_close(out, whole[0][:, :, start:end], rtol=0, atol=2 * EPS)
        torch.testing.assert_close(lse, whole[1][:, :, start:end], rtol=1e-6, atol=1e-5)


def test_partial_results_merge() -> None:
    """Keys split in two at a block: the parts merge to the whole, where the second part has no first token of its own."""
    torch.manual_seed(6)
    q, k, v = draw(1, (2, 1), 40, 192, 64)
    config = ThriftConfig(base_format="nvfp4", compute="16bit", sink_token="none", smooth="none", budget=fraction(0.0))
    parts = []
    for keys in (slice(0, 128), slice(128, 192), slice(0, 192)):
        size = keys.stop - keys.start
        sequences = dense(1, 40, size, False, q.device)
        parts.append(prefill(q, k[:, :, keys], v[:, :, keys], sequences, config, "decoded", scale=0.125)[:2])
    out, lse = merge(*zip(*parts[:2], strict=True))
    torch.testing.assert_close(lse, parts[2][1], rtol=1e-5, atol=1e-5)
    assert error(out, parts[2][0].double()) < 3 * EPS


def test_ragged_batches() -> None:
    """Sequences end to end, and a padded batch, give what each gives alone; strided inputs, no value is read beyond an end."""
    torch.manual_seed(7)
    lengths = [(65, 130), (1, 64), (40, 30)]
    config, scale = ThriftConfig(base_format="nvfp4", compute="16bit", budget=fraction(0.5)), 0.125
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(1, (2, 1), 106, 224, 64))
    cu = [torch.tensor([0, *x], device=DEVICE, dtype=torch.int32).cumsum(0).int() for x in zip(*lengths, strict=True)]
    every = packed(*cu, queries=106, keys=224, max_queries=65, max_keys=130, causal=True)
    out, lse, *_ = prefill(q, k, v, every, config, "decoded", scale=scale)
    for b, (queries, keys) in enumerate(lengths):
        qs, ks = (slice(int(x[b]), int(x[b + 1])) for x in cu)
        ends = [torch.tensor([0, n], device=DEVICE) for n in (queries, keys)]
        one = packed(*ends, queries=queries, keys=keys, max_queries=queries, max_keys=keys, causal=True)
        alone = prefill(q[:, :, qs], k[:, :, ks], v[:, :, ks], one, config, "decoded", scale=scale)
        torch.testing.assert_close(out[:, :, qs], alone[0], rtol=0, atol=0)
        torch.testing.assert_close(lse[:, :, qs], alone[1], rtol=0, atol=0)
    k, v = (torch.cat([x[:, :, :130], torch.full_like(x[:, :, :130], torch.nan)]) for x in (k, v))
    k[1, :, :30], v[1, :, :30] = k[0, :, :30], v[0, :, :30]
    q = torch.cat([q[:, :, :65]] * 2)
    lens = torch.tensor([130, 30], device=DEVICE)
    out, lse, *_ = prefill(q, k, v, padded(65, 130, True, lens), config, "decoded", scale=scale)
    for b, keys in enumerate((130, 30)):
        alone = prefill(q[b:][:1], k[b:, :, :keys][:1], v[b:, :, :keys][:1], dense(1, 65, keys, True, q.device), config,
                        "decoded", scale=scale)  # fmt: skip
        torch.testing.assert_close(out[b], alone[0][0], rtol=0, atol=0)
        torch.testing.assert_close(lse[b], alone[1][0], rtol=0, atol=0)


def test_operator_is_registered_well() -> None:
    torch.manual_seed(8)
    q, k, v = draw(1, (2, 1), 20, 64, 64)
    layout = dense(1, 20, 64, True, q.device)
    wanted = torch.ones(1, 1, dtype=torch.int32, device=DEVICE)
    numerics = KernelNumerics.of(PrefillNumerics.resolve(ThriftConfig(base_format="nvfp4", compute="16bit")), "decoded")
    arguments = (q, k, v, layout.spans, wanted, layout.pack(), [1, 0], numerics.pack(), 0.125, None, None, True)
    torch.library.opcheck(prefill_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("low", ["nvfp4", "mxfp4", "fp8"])
def test_bundles_survive_the_schema(low: str) -> None:
    for config in (ThriftConfig(base_format=low), ThriftConfig(base_format=low, compute="16bit", sink_token="none")):
        numerics = KernelNumerics.of(PrefillNumerics.resolve(config), "native")
        assert KernelNumerics.unpack(numerics.pack()) == numerics
    layout = dense(2, 20, 64, True, torch.device("cpu"))
    again = SeqLayout.unpack(layout.spans, layout.pack())
    assert vars(again) == vars(layout)
