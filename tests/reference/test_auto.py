"""What ``base_format="auto"`` is, and when exact attention runs instead: by a sequence's own facts, never by the batch."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from thrift_attn import Stats, ThriftConfig, attention, attention_varlen, dispatch, exact, fraction, support
from thrift_attn.cache import PagedThriftCache
from thrift_attn.crossovers import CROSSOVERS, EVERYWHERE, is_exact, measured
from thrift_attn.dispatch import cache_config, prefill_config, serve
from thrift_attn.exact import Call, exact_stats
from thrift_attn.interface import attend
from thrift_attn.numerics import PrefillNumerics

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def call(queries: int = 65536, keys: int | None = None, **facts: Any) -> Call:
    given = {"device": CUDA, "dtype": torch.bfloat16, "head_dim": 128, **facts}
    return Call(queries=queries, keys=queries if keys is None else keys, **given)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Pretend that CUDA devices have a capability, and that FlashAttention-3 is installed or not."""

    def pretend(capability: tuple[int, int], fa3: bool = True, lacks: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.setattr(exact, "fa3", lambda: (print, frozenset(lacks)) if fa3 else None)
        monkeypatch.setattr(dispatch, "_told", set())

    return pretend


# -- the format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "by", "form", "base_format", "below"),
    [
        ((7, 5), "exact", "decoded", "nvfp4", EVERYWHERE),
        ((8, 0), "exact", "decoded", "nvfp4", EVERYWHERE),
        ((8, 6), "exact", "decoded", "nvfp4", EVERYWHERE),
        ((8, 9), "triton", "native", "fp8", 0),
        ((9, 0), "triton", "native", "fp8", 21504),
        ((10, 0), "triton", "native", "nvfp4", 0),
        ((10, 3), "triton", "native", "nvfp4", 0),
        ((12, 0), "triton", "native", "nvfp4", 0),
    ],
)
def test_auto_is_what_the_gpu_has_units_for(gpu, capability, by, form, base_format, below):
    gpu(capability)
    found = serve("auto", ThriftConfig(), call())
    assert (found.by, found.form) == (by, form)
    assert found.config == ThriftConfig(base_format=base_format, exact_below=below)
    assert bool(found.why) == (by == "exact")


@pytest.mark.parametrize(
    "options", [{"compute": "16bit"}, {"promoted_storage": "nested"}, {"promoted_storage": "nested8"}]
)
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_arithmetic_that_only_four_bits_have_is_nvfp4(gpu, capability, options):
    gpu(capability)
    config = ThriftConfig(**options)
    assert prefill_config(config, call(64)) == config.with_(base_format="nvfp4", exact_below=0)


def test_on_a_cpu_auto_is_nvfp4_with_its_arithmetic():
    q, k, v = (torch.randn(1, 2, 1500, 32) for _ in "qkv")
    assert prefill_config(ThriftConfig(), call(device=CPU)) == ThriftConfig(base_format="nvfp4", exact_below=0)
    named = ThriftConfig(base_format="nvfp4", compute="fp4")
    assert torch.equal(attention(q, k, v), attention(q, k, v, config=named))


@pytest.mark.parametrize("config", [None, ThriftConfig(budget=0.07), ThriftConfig(base_format="nvfp4", budget=0.07)])
def test_a_second_call_makes_no_configuration(monkeypatch, config):
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in "qkv")
    first = attention(q, k, v, config=config)
    made: list[ThriftConfig] = []
    checked = ThriftConfig.__post_init__
    monkeypatch.setattr(ThriftConfig, "__post_init__", lambda self: (made.append(self), checked(self))[1])
    assert torch.equal(attention(q, k, v, config=config), first)
    assert made == []


@pytest.mark.parametrize("facts", [{"dtype": torch.float32}, {"head_dim": 48}])
def test_what_has_no_kernels_on_a_gpu_is_exact(gpu, facts):
    gpu((9, 0))
    found = serve("auto", ThriftConfig(), call(100_000, **facts))
    assert found.by == "exact"
    assert "SDPA" in found.why
    assert serve("auto", ThriftConfig(base_format="fp8"), call(100_000, **facts)).by == "reference"


def test_a_format_that_is_named_runs_as_named(gpu):
    gpu((9, 0))
    for name, queries in itertools.product(("nvfp4", "mxfp4", "fp8"), (17, 1000, 20_000)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = serve("auto", ThriftConfig(base_format=name), call(queries))
        assert (found.by, found.config.base_format, found.config.exact_below) == ("triton", name, 0)
    for config in (ThriftConfig.paper(), ThriftConfig.for_cache()):
        assert config.base_format == "nvfp4"
    assert ThriftConfig.sparse("quest").base_format == "drop"


def test_a_cache_holds_nvfp4_on_every_device():
    config = ThriftConfig(compute="16bit", promoted_storage="nested")
    assert cache_config(config) == ThriftConfig.for_cache()
    cache = PagedThriftCache(
        batch=1, kv_heads=1, head_dim=32, num_pages=2, config=config, dtype=torch.float32, device="cpu"
    )
    assert cache.config == ThriftConfig.for_cache()


def test_numerics_never_see_auto():
    with pytest.raises(ValueError, match="'auto' has no numerics"):
        PrefillNumerics.resolve(ThriftConfig())


def test_emulation_is_told_once_for_each_format(gpu):
    gpu((9, 0))
    for name in ("nvfp4", "mxfp4"):
        with pytest.warns(UserWarning, match=f"base_format='{name}' is emulated on a GPU"):
            serve("auto", ThriftConfig(base_format=name), call())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in (ThriftConfig(base_format="nvfp4"), ThriftConfig(), ThriftConfig(base_format="fp8")):
            serve("auto", config, call())
        serve("auto", ThriftConfig(base_format="nvfp4", compute="16bit"), call())
        gpu((8, 0))
        serve("auto", ThriftConfig(), call(window=100))  # by kernels, every block promoted: nothing is emulated
        gpu((10, 0))
        serve("auto", ThriftConfig(base_format="nvfp4"), call())


# -- dispatch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", CROSSOVERS, ids=lambda row: f"{row.server} {row.head_dim}")
def test_a_short_prompt_is_exact_where_that_has_been_measured(gpu, row):
    gpu(row.capability, fa3=row.server == "FlashAttention-3")
    for keys, by in ((1, "exact"), (row.keys - 1, "exact"), (row.keys, "triton"), (row.keys * 8, "triton")):
        found = serve("auto", ThriftConfig(), call(keys, head_dim=row.head_dim))
        assert found.by == by, keys
        assert (row.server in found.why) == (by == "exact")
    for off in (ThriftConfig(exact_below=0), ThriftConfig(base_format="fp8")):
        assert serve("auto", off, call(row.keys - 1, head_dim=row.head_dim)).by == "triton"
    assert serve("triton", ThriftConfig(), call(100)).by == "triton"
    assert serve("reference", ThriftConfig(), call(100)).by == "reference"


def test_what_has_not_been_measured_is_not_dispatched(gpu):
    for capability in ((8, 9), (10, 0), (12, 0)):
        gpu(capability)
        assert serve("auto", ThriftConfig(), call(100)).by == "triton"
    gpu((9, 0))
    assert serve("auto", ThriftConfig(), call(100, head_dim=256)).by == "triton"
    assert measured((9, 0), "fp8", 256, "FlashAttention-3") == 0


@pytest.mark.parametrize(
    ("facts", "fa3", "by"),
    [
        ({}, True, "exact"),
        ({}, False, "exact"),
        ({"lse": True}, True, "exact"),
        ({"lse": True}, False, "triton"),  # SDPA returns none
        ({"softcap": 20.0}, True, "exact"),
        ({"softcap": 20.0}, False, "triton"),
        ({"window": 50}, True, "triton"),
        ({"causal": False}, True, "triton"),  # not measured
        ({"packed": True}, True, "triton"),
        ({"keys": 900}, True, "triton"),  # queries before position 0
        ({"keys": 4000}, True, "exact"),
        ({"keys": 4000}, False, "triton"),  # PyTorch's kernel for longer chunks is another one
        ({"queries": 16, "keys": 100_000}, True, "exact"),
        ({"queries": 256, "keys": 100_000}, False, "exact"),
        ({"queries": 257, "keys": 100_000}, False, "triton"),
        ({"queries": 1791, "keys": 100_000}, True, "exact"),
        ({"queries": 1792, "keys": 100_000}, True, "triton"),
    ],
)
def test_only_what_is_served_with_the_same_semantics_is_dispatched(gpu, facts, fa3, by):
    gpu((9, 0), fa3=fa3)
    assert serve("auto", ThriftConfig(), call(**{"queries": 1000, **facts})).by == by


def test_a_build_without_a_feature_is_not_asked_for_it(gpu):
    gpu((9, 0), lacks=("FP16", "SOFTCAP"))
    assert "SDPA" in serve("auto", ThriftConfig(), call(1000, dtype=torch.float16)).why
    assert "FlashAttention-3" in serve("auto", ThriftConfig(), call(1000)).why
    assert serve("auto", ThriftConfig(), call(1000, softcap=5.0)).by == "triton"


def test_the_rule():
    assert is_exact(100, 99)
    assert not is_exact(100, 100)
    assert is_exact(100, 10_000, 8)
    assert not is_exact(100, 10_000, 9)
    assert not is_exact(0, 1, 1)
    found = is_exact(100, torch.tensor([99, 100, 100]), torch.tensor([99, 8, 9]))
    assert found.tolist() == [True, True, False]


# -- what is computed (on a CPU, where a length has to be named) ------------------------------------------------------


def qkv(queries: int, keys: int, batch: int = 1, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(queries + keys)
    shapes = ((batch, 4, queries, 32), (batch, 2, keys, 32), (batch, 2, keys, 32))
    return tuple(torch.randn(shape, generator=draw).to(dtype) for shape in shapes)


LOW = ThriftConfig(budget=fraction(0), exact_below=400)
"""Nothing promoted from 400 keys on, everything exact below."""


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 399), (399, 399), (70, 399), (33, 2000)])
@pytest.mark.parametrize("causal", [True, False])
def test_exact_is_exact_and_labelled(queries, keys, causal):
    q, k, v = qkv(queries, keys)
    found = attend(q, k, v, config=LOW, causal=causal, return_stats=True)
    assert found.served.by == "exact"
    want = attention(
        q.double(), k.double(), v.double(), config=ThriftConfig(budget=fraction(1), exact_below=0), causal=causal
    )
    torch.testing.assert_close(found.out.double(), want, rtol=0, atol=1e-5)
    by_reference = attend(q, k, v, config=LOW, causal=causal, return_stats=True, backend="reference")
    assert by_reference.served.by == "reference"
    torch.testing.assert_close(found.out, by_reference.out, rtol=0, atol=1e-5)
    assert found.stats == replace(by_reference.stats, mass=found.stats.mass)
    assert by_reference.stats.mass == pytest.approx(found.stats.mass)
    assert found.stats.exact == found.stats.visible == found.stats.promoted == found.stats.asked > 0


@pytest.mark.parametrize(("queries", "keys"), [(400, 400), (100, 2000)])
def test_from_the_length_on_it_is_thrift(queries, keys):
    q, k, v = qkv(queries, keys)
    found = attend(q, k, v, config=LOW, return_stats=True)
    assert found.served.by == "reference"
    assert found.stats.exact == found.stats.promoted == 0
    assert torch.equal(found.out, attention(q, k, v, config=LOW.with_(exact_below=0)))


@pytest.mark.parametrize("options", [{"return_lse": True}, {"softcap": 5.0}, {"window": 33}], ids=str)
def test_what_sdpa_lacks_is_exact_all_the_same(options):
    q, k, v = qkv(200, 300)
    out, every = (attention(q, k, v, config=c, **options) for c in (LOW, ThriftConfig(budget=fraction(1))))
    torch.testing.assert_close(out, every, rtol=0, atol=1e-6)
    assert attend(q, k, v, config=LOW, **options).served.by == "reference"


@pytest.mark.parametrize("queries", [1, 120, 700])
def test_a_row_does_not_depend_on_its_neighbours(queries):
    lengths = [700, 399, 130, 400, 1]
    q, k, v = qkv(queries, 700, batch=len(lengths))
    for row, n in enumerate(lengths):
        k[row, :, n:] = v[row, :, n:] = torch.nan
    found = attend(q, k, v, config=LOW, kv_lengths=torch.tensor(lengths), return_stats=True)
    total = Stats()
    for row, n in enumerate(lengths):
        seen = min(queries, n)
        alone = attend(
            q[row : row + 1, :, queries - seen :],
            k[row : row + 1, :, :n],
            v[row : row + 1, :, :n],
            config=LOW,
            return_stats=True,
        )
        torch.testing.assert_close(found.out[row : row + 1, :, queries - seen :], alone.out, rtol=0, atol=1e-5)
        assert not found.out[row, :, : queries - seen].any()
        if alone.served.by == "exact":
            assert torch.equal(found.out[row : row + 1, :, queries - seen :], alone.out)
        total += alone.stats
    assert (found.stats.visible, found.stats.promoted, found.stats.exact) == (
        total.visible,
        total.promoted,
        total.exact,
    )
    # Neighbours come and go.
    few = attend(q[:2], k[:2], v[:2], config=LOW, kv_lengths=torch.tensor(lengths[:2]))
    torch.testing.assert_close(few.out, found.out[:2], rtol=0, atol=1e-5)
    assert (found.served.why == "short rows exactly") == (found.served.by != "exact")


def test_packed_sequences_are_exact_by_their_own_length():
    lengths = [500, 399, 20, 400]
    q, k, v = (x[0].transpose(0, 1) for x in qkv(sum(lengths), sum(lengths)))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    out = attention_varlen(q, k, v, cu, cu, 500, 500, config=LOW)
    for a, b in itertools.pairwise(cu.tolist()):
        one = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        share = 1.0 if b - a < 400 else 0.0
        want = attention(*one, config=ThriftConfig(budget=fraction(share), exact_below=0))
        torch.testing.assert_close(out[a:b].transpose(0, 1)[None], want, rtol=0, atol=1e-5)


def test_stats_of_exact_calls_count_what_the_reference_counts():
    for queries, keys, causal in ((17, 17, True), (130, 700, True), (64, 64, False), (100, 333, False), (3, 333, True)):
        q, k, v = qkv(queries, keys)
        want = attend(
            q, k, v, config=ThriftConfig(budget=fraction(1)), causal=causal, return_stats=True, backend="reference"
        )
        got = exact_stats(call(queries, keys, causal=causal, device=CPU), heads=4)
        assert got == replace(want.stats, exact=want.stats.visible, mass=got.mass)
        assert got.mass == pytest.approx(want.stats.mass)


# -- the table for people ---------------------------------------------------------------------------------------------


def test_doctor_tells_what_auto_means(gpu):
    assert any("base_format='auto'" in row.feature and "nvfp4" in row.why for row in support("cpu"))
    for capability, told in (((8, 0), "exact 16-bit attention by SDPA"), ((10, 0), "nvfp4"), ((9, 0), "fp8; smooth=")):
        gpu(capability)
        auto = next(row for row in support("cuda") if "base_format='auto'" in row.feature)
        assert told in auto.why
    rows = [row.feature for row in support("cuda") if "keys, head_dim" in row.feature]
    assert len(rows) == sum(row.capability == (9, 0) for row in CROSSOVERS) > 0
