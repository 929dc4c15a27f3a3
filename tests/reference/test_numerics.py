"""What options mean is worked out once, and an option that is said to be ignored changes no bit."""

import dataclasses
import itertools

import pytest
import torch

from thrift_attn import ThriftConfig, attention, fraction
from thrift_attn.cache import PagedThriftCache
from thrift_attn.numerics import DecodeNumerics, PrefillNumerics, describe_ignored

NEUTRAL = {"smooth": "none", "scales": "max", "normalize": "exact", "center": "block", "compute": "16bit"}
CONFIGS = [
    ThriftConfig(base_format=base, compute=compute, promoted_storage=storage, sink_token=sink, budget=fraction(0.3))
    for base, compute, storage, sink in itertools.product(
        ("nvfp4", "mxfp4", "fp8"), ("fp4", "16bit"), ("16bit", "nested", "nested8"), ("exact", "none")
    )
] + [ThriftConfig.sparse("quest", budget=fraction(0.3))]


def name(config: ThriftConfig) -> str:
    return f"{config.base_format}-{config.compute}-{config.promoted_storage}-{config.sink_token}"


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_ignored_options_change_no_bit_of_attention(config):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 200, 32)
    numerics = PrefillNumerics.resolve(config)
    changed = config.with_(**{option: NEUTRAL[option] for option in numerics.ignored})
    assert torch.equal(attention(q, k, v, config=config), attention(q, k, v, config=changed))
    assert PrefillNumerics.resolve(changed) == dataclasses.replace(numerics, ignored=())


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.base_format == "nvfp4" and c.compute == "fp4"], ids=name)
def test_options_that_are_not_ignored_change_something(config):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 200, 32)
    k[..., 3] *= 100  # powers of two change nothing unless a channel stands out, or scales are very large or small
    assert not PrefillNumerics.resolve(config).ignored
    for option in ("smooth", "scales", "normalize", "center"):
        changed = config.with_(**{option: NEUTRAL[option]})
        assert not torch.equal(attention(q, k, v, config=config), attention(q, k, v, config=changed)), option


def test_what_is_ignored_by_configuration():
    assert PrefillNumerics.resolve(ThriftConfig(base_format="nvfp4")).ignored == ()
    assert PrefillNumerics.resolve(ThriftConfig(base_format="fp8")).ignored == (
        "smooth",
        "scales",
        "center",
        "normalize",
    )
    assert PrefillNumerics.resolve(ThriftConfig(base_format="nvfp4", compute="16bit")).ignored == (
        "center",
        "normalize",
    )
    assert PrefillNumerics.resolve(ThriftConfig.sparse("quest")).ignored == ("compute",)
    assert DecodeNumerics.resolve(ThriftConfig.for_cache()).ignored == ("center", "normalize")


def test_ignored_options_are_told_to_people():
    config = ThriftConfig(base_format="fp8")
    told = describe_ignored(config, PrefillNumerics.resolve(config))
    assert "smooth='channel' does nothing with base_format='fp8'" in told
    assert "center='all' does nothing more than center='block' with base_format='fp8'" in told
    config = ThriftConfig(base_format="nvfp4", compute="16bit")
    assert "normalize='rounded' does nothing with compute='16bit'" in describe_ignored(
        config, PrefillNumerics.resolve(config)
    )


def test_a_cache_ignores_what_it_says():
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 300, 64)
    q = torch.randn(1, 4, 2, 64)
    config = ThriftConfig.for_cache(budget=fraction(0.3))
    changed = config.with_(**{option: NEUTRAL[option] for option in DecodeNumerics.resolve(config).ignored})
    outs = []
    for chosen in (config, changed):
        cache = PagedThriftCache(
            batch=1, kv_heads=2, head_dim=64, num_pages=8, config=chosen, dtype=torch.float32, device="cpu"
        )
        cache.append(k, v)
        outs.append(cache.attend(q))
    assert torch.equal(*outs)


def test_records_hold_plain_values():
    assert PrefillNumerics.resolve(ThriftConfig(base_format="nvfp4")).to_dict()["budget"] == "max(0.05, 16)"
    assert DecodeNumerics.resolve(ThriftConfig.for_cache()).to_dict()["residual"] == "nested"
