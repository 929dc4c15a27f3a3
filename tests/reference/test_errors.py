"""Bad input gets one clear error before any work."""

import math
import warnings

import pytest
import torch

from thrift_attn import Budget, ThriftConfig, attention, attention_varlen, floored, fraction, top_k

GOOD = {"q": (1, 4, 8, 64), "k": (1, 2, 8, 64), "v": (1, 2, 8, 64)}


def call(shapes=None, dtypes=None, **options):
    shapes, dtypes = {**GOOD, **(shapes or {})}, dtypes or {}
    tensors = [torch.zeros(shapes[n], dtype=dtypes.get(n, torch.float32)) for n in "qkv"]
    return attention(*tensors, **options)


def test_the_good_call_works():
    assert call().shape == GOOD["q"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (4, 8, 64)}, r"q must have 4 dimensions \[B, H, T, D\], got shape \[4, 8, 64\]"),
        ({"v": (1, 2, 9, 64)}, "k and v must have one shape"),
        ({"q": (2, 4, 8, 64)}, "agree in batch and head dim"),
        ({"q": (1, 4, 8, 32)}, "agree in batch and head dim"),
        ({"q": (1, 3, 8, 64)}, "multiple of KV heads, got 3 and 2"),
        ({"q": (1, 4, 0, 64)}, "q must not be empty"),
        ({"k": (1, 2, 0, 64), "v": (1, 2, 0, 64)}, "k must not be empty"),
    ],
)
def test_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        call(shapes)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"k": torch.float16}, "share one dtype"),
        (dict.fromkeys("qkv", torch.int32), "q must be float16, bfloat16, float32 or float64, got torch.int32"),
    ],
)
def test_dtypes(dtypes, message):
    with pytest.raises(TypeError, match=message):
        call(dtypes=dtypes)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        attention([1.0], torch.zeros(1, 2, 8, 64), torch.zeros(1, 2, 8, 64))  # type: ignore[call-overload]


def test_devices():
    q = torch.zeros(GOOD["q"], device="meta")
    with pytest.raises(ValueError, match="one device"):
        attention(q, torch.zeros(GOOD["k"]), torch.zeros(GOOD["v"]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 0.0}, ValueError, "scale must be a finite number > 0"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number > 0, got nan"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"window": 0}, ValueError, "window must be at least 1 token and at most 2147483647, got 0"),
        ({"window": 2**40}, ValueError, "window must be at least 1 token and at most 2147483647, got 1099511627776"),
        ({"scale": 1e300}, ValueError, "scale must be a normal float32"),
        ({"softcap": 1e-300}, ValueError, "softcap must be a normal float32"),
        ({"scale": "big"}, TypeError, "scale must be a number, got str"),
        ({"config": "fp4"}, TypeError, "config must be a ThriftConfig or None, got str"),
        ({"window": 1.5}, TypeError, "window must be an int"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, NotImplementedError, "triton"),
        ({"kv_lengths": [8]}, TypeError, "int32 or int64 tensor, got list"),
        ({"kv_lengths": torch.tensor([8.0])}, TypeError, "got torch.float32"),
        ({"kv_lengths": torch.tensor([8, 8])}, ValueError, r"shape \[1\], got \[2\]"),
        ({"kv_lengths": torch.tensor([0])}, ValueError, r"in \[1, 8\], got \[0\]"),
        ({"kv_lengths": torch.tensor([9])}, ValueError, r"in \[1, 8\], got \[9\]"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        call(**options)


def test_gradients_are_refused_and_inference_is_not():
    q, k, v = (torch.zeros(GOOD[n], requires_grad=True) for n in "qkv")
    with pytest.raises(NotImplementedError, match="inference only"):
        attention(q, k, v)
    with torch.no_grad():
        attention(q, k, v)


@pytest.mark.parametrize("share", [-0.01, 1.01, math.nan, math.inf])
def test_fraction_range(share):
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
        fraction(share)


def test_other_budgets():
    for bad in (-1, 1.5, math.nan, math.inf, 10**30):
        with pytest.raises(ValueError, match="whole number"):
            top_k(bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a number, got str"):
        fraction("0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget kind must be one of"):
        Budget("most", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no value"):
        Budget("paper", 3)
    with pytest.raises(ValueError, match="at least 1 and at most 2147483647 blocks, got 0"):
        floored(0.05, blocks=0)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 5"):
        floored(5, blocks=16)
    with pytest.raises(TypeError, match="must be an int, got float"):
        floored(0.05, blocks=16.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only a floored budget has least blocks, got 3 with kind 'fraction'"):
        Budget("fraction", 0.05, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"base_format": "int4"},
            ValueError,
            "base_format must be one of 'auto', 'nvfp4', 'mxfp4', 'fp8', 'drop', got 'int4'",
        ),
        ({"compute": "bf16"}, ValueError, "compute must be one of"),
        ({"center": True}, ValueError, "center must be one of"),
        ({"score": "best"}, ValueError, "score must be one of"),
        ({"promoted_storage": "32bit"}, ValueError, "promoted_storage must be one of"),
        ({"budget": None}, TypeError, r"budget must be a Budget such as top_k\(8\), a share such as 0.05"),
        ({"budget": True}, TypeError, "got bool"),
        ({"budget": 5}, ValueError, r"in \[0, 1\], got 5"),
        ({"budget": "many"}, ValueError, "got 'many'"),
        ({"force_first": 2**40}, ValueError, "at most 2147483647, got 1099511627776"),
        ({"force_first": -1}, ValueError, "force_first must be >= 0"),
        ({"force_last": 1.0}, TypeError, "force_last must be an int"),
        ({"base_format": "drop"}, ValueError, "quantises nothing"),
        ({"exact_below": -1}, ValueError, "exact_below must be >= 0"),
        ({"exact_below": 0.5}, TypeError, "exact_below must be an int, got float"),
        ({"exact_below": 10, "promoted_storage": "nested"}, ValueError, "planes are not exact, got 'nested'"),
        ({"sink_token": "key"}, ValueError, "sink_token must be one of 'none', 'exact', got 'key'"),
        (
            {"center": "none"},
            ValueError,
            "sink_token='exact' is the centre of its block: it needs center='block' or 'all'",
        ),
        (
            {"base_format": "drop", "center": "none", "scales": "max", "smooth": "none", "normalize": "exact"},
            ValueError,
            "it needs smooth='none', normalize='exact' and sink_token='none'",
        ),
    ],
)
def test_config(options, error, message):
    with pytest.raises(error, match=message):
        ThriftConfig(**options)


def test_config_is_frozen_and_goes_to_json():
    import json

    config = ThriftConfig(budget=top_k(3))
    with pytest.raises(AttributeError):
        config.base_format = "fp8"  # type: ignore[misc]
    plain = json.loads(json.dumps(config.to_dict()))
    assert ThriftConfig(**{**plain, "budget": Budget.parse(plain["budget"])}) == config


# -- those who come from other libraries ------------------------------------------------------------------------------


def made(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("queries", "keys"), [(100, 100), (3, 200)])
def test_layout_of_flash_attention(queries, keys):
    q, k, v = made(2, queries, 4, 32), made(2, keys, 2, 32), made(2, keys, 2, 32)
    out, lse = attention(q, k, v, layout="BTHD", return_lse=True)
    want, want_lse = attention(*(x.transpose(1, 2) for x in (q, k, v)), return_lse=True)
    assert torch.equal(out, want.transpose(1, 2))
    assert torch.equal(lse, want_lse)
    assert out.is_contiguous()


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout must be one of 'BHTD', 'BTHD', got 'NHD'"):
        call(layout="NHD")


@pytest.mark.parametrize(
    ("q", "k"),
    [((1, 200, 4, 32), (1, 200, 4, 32)), ((1, 20, 4, 32), (1, 20, 2, 32))],  # many heads; more queries than keys
)
def test_shapes_that_look_like_flash_attention_get_a_warning(q, k):
    tensors = made(*q), made(*k), made(*k)
    with pytest.warns(UserWarning, match=r"are taken as \[B, H, T, D\].*need layout='BTHD'"):
        attention(*tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*tensors, layout="BTHD")
        attention(*(x.transpose(1, 2) for x in tensors))


def test_a_step_of_decode_in_the_other_layout_says_so():
    with pytest.raises(ValueError, match=r"multiple of KV heads, got 1 and 200.*need layout='BTHD'"):
        call({"q": (1, 1, 4, 64), "k": (1, 200, 2, 64), "v": (1, 200, 2, 64)})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"is_causal": True}, "takes no is_causal=; use causal=, which is True by default"),
        ({"attn_mask": None}, "takes no attn_mask=; use causal="),
        ({"softmax_scale": 0.1}, "takes no softmax_scale=; use scale="),
        ({"budget": 0.05}, r"takes no budget=; use config=ThriftConfig\(budget=...\)"),
        ({"colour": "red"}, "takes no colour=$"),
    ],
)
def test_names_of_other_libraries(option, message):
    with pytest.raises(TypeError, match=message):
        call(**option)
    with pytest.raises(TypeError, match=message):
        attention_varlen(*made(3, 4, 2, 32), torch.tensor([0, 4]), torch.tensor([0, 4]), 4, 4, **option)


@pytest.mark.parametrize("budget", [0.05, "5%", "0.05", fraction(0.05)])
def test_a_budget_is_a_share_or_text(budget):
    for make in (ThriftConfig, ThriftConfig.paper, ThriftConfig.for_cache, ThriftConfig().with_):
        assert make(budget=budget).budget == fraction(0.05)
    assert ThriftConfig.sparse("quest", budget=budget).budget == fraction(0.05)
