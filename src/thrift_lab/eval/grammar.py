"""How methods are written: what `thrift eval methods` prints and the docs hold."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_type_hints

from thrift_attn.config import ThriftConfig
from thrift_attn.reference.scores import SCORES
from thrift_lab.eval.methods import METHOD_KINDS, parse_method
from thrift_lab.sheet import Sheet

GRAMMAR = (
    "A method is KIND, or KIND:OPTION=VALUE,OPTION=VALUE; methods have commas between them.",
    "fp16,fp4,thrift,thrift:budget=10%,promoted_storage=nested are four methods: a piece with = belongs to the one before it.",
)
_BUDGET = "5% or 0.05 (that share of all visible blocks), max(5%, 16) (at least 16 of a row), top_k(8), paper"


def kinds() -> Sheet:
    """Every kind of method: what it is and which options it takes."""
    every = METHOD_KINDS["thrift"].options
    body = []
    for name, kind in METHOD_KINDS.items():
        lacking = [option for option in every if option not in kind.options]
        if isinstance(kind.make, type):  # options of its own, with their defaults
            defaults = ((option.name, _default(option)) for option in fields(kind.make))
            taken = ", ".join(f"{option}={value}" for option, value in defaults)
        elif not lacking:
            taken = "all"
        elif len(lacking) < len(kind.options):
            taken = f"all but {', '.join(lacking)}"
        else:
            taken = ", ".join(kind.options) or "none"
        body.append([name, kind.about, taken])
    return Sheet(("kind", "what it computes", "options"), body, left=3)


def _default(option: Field[Any]) -> Any:
    """Return what an option of a dataclass is if it is not given."""
    return option.default if option.default is not MISSING else option.default_factory()  # pyright: ignore[reportCallIssue]


def options() -> Sheet:
    """Every option of ``thrift``: its values, and what it is there and in ``paper`` if it is not given."""
    hints = get_type_hints(ThriftConfig)
    usual = [_values(name) for name in ("thrift", "paper")]
    body = []
    for field in fields(ThriftConfig):
        if field.name not in METHOD_KINDS["thrift"].options:
            continue
        known: dict[str, str] = {
            "budget": _BUDGET,
            "score": ", ".join(SCORES),
            "residual_share": "a share from 0 to 1, of `cache` alone",
        }
        named = [value for value in get_args(hints[field.name]) if value != "auto"]  # a record names its format
        words = known.get(field.name) or ", ".join(named) or "a whole number of blocks"
        body.append([field.name, words, *(str(row[field.name]) for row in usual)])
    return Sheet(("option", "values", "thrift", "paper"), body, left=4)


def _values(kind: str) -> dict[str, Any]:
    config = parse_method(kind).config
    assert config is not None
    return config.to_dict()


def markdown() -> str:
    """All of it for the docs."""
    return "\n\n".join([" ".join(GRAMMAR), *(table.markdown(code=True) for table in (kinds(), options()))]) + "\n"
