"""Method specs."""

from __future__ import annotations

import pytest

from thrift_attn import Budget, ThriftConfig, fraction, top_k
from thrift_lab.eval.methods import METHOD_KINDS, ignored_options, parse_method, parse_methods, sweep


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        ("fp16", None),
        ("fp4", ThriftConfig.paper(budget=fraction(0))),
        ("fp4:low=mxfp4,center=block", ThriftConfig.paper(budget=fraction(0), base_format="mxfp4", center="block")),
        ("paper", ThriftConfig.paper()),
        ("thrift", ThriftConfig(base_format="nvfp4", budget=fraction(0.05))),
        (
            " thrift : budget = 10% , promoted_storage=nested ",
            ThriftConfig(base_format="nvfp4", budget=fraction(0.1), promoted_storage="nested"),
        ),
        (
            "thrift:math=16bit,force_first=2,force_last=0",
            ThriftConfig(base_format="nvfp4", compute="16bit", force_first=2, force_last=0, budget=fraction(0.05)),
        ),
        ("thrift:budget=max(5%, 16),force_first=2", ThriftConfig(base_format="nvfp4", force_first=2)),
        ("quest:budget=top_k(8)", ThriftConfig.sparse("quest", budget=top_k(8))),
        ("topk", ThriftConfig.sparse("oracle")),
        ("local", ThriftConfig.sparse("local")),
    ],
)
def test_specs(spec: str, config: ThriftConfig | None) -> None:
    assert parse_method(spec).config == config


def test_a_list_gives_options_to_the_method_before_them() -> None:
    methods = parse_methods("fp16, thrift:budget=0.1,promoted_storage=nested, paper, quest:budget=5%")
    assert [method.name for method in methods] == [
        "fp16",
        "thrift:budget=0.1,promoted_storage=nested",
        "paper",
        "quest:budget=0.05",
    ]
    assert [method.family for method in methods] == ["fp16", "thrift:promoted_storage=nested", "paper", "quest"]
    floored = parse_methods("thrift:budget=max(5%, 16),force_first=2,paper")
    assert [method.name for method in floored] == ["thrift:budget=max(0.05, 16),force_first=2", "paper"]
    assert [method.family for method in floored] == ["thrift:force_first=2", "paper"]
    assert parse_method(floored[0].name) == floored[0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("magic", "unknown method 'magic': there are fp16, fp4, paper, thrift, quest, topk, local"),
        ("thrift:colour=red", "has no option 'colour': it takes base_format, compute, center"),
        ("fp16:budget=1", "has no option 'budget': it takes none"),
        ("fp4:budget=0.1", "has no option 'budget': it takes base_format, compute, center"),
        ("quest:base_format=fp8", "has no option 'base_format': it takes budget, force_first, force_last"),
        ("thrift:", "has no option ''"),
        ("thrift:budget", "needs a value, as in budget=..."),
        ("thrift:budget=", "needs a value"),
        (
            "thrift:promoted_storage=nested,promoted_storage=16bit",
            "'promoted_storage' of method 'thrift' is given twice",
        ),
        ("thrift:budget=-0.1", "option budget: .*got '-0.1'"),
        ("thrift:budget=nan", "option budget: .*got 'nan'"),
        ("thrift:budget=1.5", "option budget: .*got '1.5'"),
        ("thrift:budget=top_k(-1)", "option budget"),
        ("thrift:force_first=x", "option force_first: invalid literal"),
        ("thrift:force_last=-1", "force_last must be >= 0 and at most 2147483647, got -1"),
        ("thrift:promoted_storage=gold", "promoted_storage must be one of '16bit', 'nested', 'nested8', got 'gold'"),
        ("thrift:base_format=auto", "a record names its format"),
        ("thrift:exact_below=100", "has no option 'exact_below'"),
        ("thrift:base_format=drop", "base_format='drop' quantises nothing"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no method given"),
        (" , ", "no method given"),
        ("fp16,fp16", "'fp16' and 'fp16' are the same computation"),
        ("thrift,paper,thrift:budget=5%", "'thrift' and 'thrift:budget=0.05' are the same computation"),
        ("fp4,paper:budget=0", "'fp4' and 'paper:budget=0' are the same"),
    ],
)
def test_bad_lists(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_methods(text)


def test_sweep_adds_budgets_where_none_is_named() -> None:
    methods = parse_methods("fp16,fp4,paper,thrift:promoted_storage=nested,thrift:budget=0.2,quest")
    rows = sweep(methods, [Budget.parse(text) for text in ("0", "5%", "top_k(2)")])
    assert [row.name for row in rows[len(methods) :]] == [
        "paper:budget=top_k(2)",  # at 0 it is fp4, at 5% itself
        "thrift:promoted_storage=nested,budget=0",
        "thrift:promoted_storage=nested,budget=top_k(2)",
        "quest:budget=top_k(2)",  # dropping everything makes no sense
    ]
    assert [parse_method(row.name) for row in rows] == rows


def test_every_kind_is_described() -> None:
    assert all(kind.about for kind in METHOD_KINDS.values())


def test_records_name_the_options_that_do_nothing() -> None:
    assert ignored_options(parse_method("fp16")) == []
    assert ignored_options(parse_method("thrift")) == []
    ignored = ignored_options(parse_method("thrift:base_format=fp8"))
    assert {"smooth", "scales", "normalize"} <= set(ignored)
