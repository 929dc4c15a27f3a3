"""Method specs: ``fp16``, ``fp4``, ``thrift:budget=0.1,promoted_storage=nested``, ``quest:budget=5%``, ``snapkv:keep=0.3``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from thrift_attn.config import OLD_NAMES, Budget, ThriftConfig, current_names, fraction
from thrift_attn.numerics import PrefillNumerics
from thrift_lab.console import words
from thrift_lab.eval.eviction import Eviction
from thrift_lab.eval.rivals.rival import Rival
from thrift_lab.eval.rivals.rival_table import RIVALS, name_of


def _parser(option: Field[Any]) -> Callable[[str], Any]:
    """From text to the value of an option of `ThriftConfig` or of a rival."""
    if option.name == "budget":
        return Budget.parse
    return next((kind for kind in (int, float) if type(option.default) is kind), str)


_PARSERS: dict[str, Callable[[str], Any]] = {
    option.name: _parser(option)
    for kind in (ThriftConfig, *(kind for kind, _ in RIVALS.values()))
    for option in fields(kind)
}
_PARSERS["keep"] = float
_OPTIONS = tuple(option.name for option in fields(ThriftConfig) if option.name != "exact_below")
"""Quality is that of the numerics: nothing is attended exactly because it is faster."""
_PROMOTION = ("budget", "score", "force_first", "force_last", "promoted_storage")
_SPARSE = ("budget", "force_first", "force_last")


@dataclass(frozen=True)
class Cached:
    """Answers through `thrift_attn.transformers.ThriftCache`: pages hold the prompt, decode promotes from them.

    Args:
        config: of the cache.
    """

    config: ThriftConfig


@dataclass(frozen=True)
class _Kind:
    make: Callable[..., ThriftConfig | Eviction | Rival | Cached | None]
    options: tuple[str, ...]
    about: str


METHOD_KINDS: dict[str, _Kind] = {
    "fp16": _Kind(lambda: None, (), "the model's own attention in its own dtype"),
    "fp4": _Kind(
        lambda **options: ThriftConfig.paper(**{"budget": fraction(0), **options}),
        tuple(option for option in _OPTIONS if option not in _PROMOTION),
        "every block in 4 bits",
    ),
    "paper": _Kind(ThriftConfig.paper, _OPTIONS, "4 bits and the paper's promotion, 5% of the blocks"),
    "thrift": _Kind(
        lambda **options: ThriftConfig(**{"base_format": "nvfp4", "budget": fraction(0.05), **options}),
        _OPTIONS,
        "the form of this package with 5% of the blocks and no floor, or any other",
    ),
    "quest": _Kind(lambda **o: ThriftConfig.sparse("quest", **o), _SPARSE, "drops blocks by min/max bounds"),
    "topk": _Kind(
        lambda **o: ThriftConfig.sparse("oracle", **o), _SPARSE, "drops blocks by their true mass (an oracle)"
    ),
    "local": _Kind(lambda **o: ThriftConfig.sparse("local", **o), _SPARSE, "drops all but the nearest blocks"),
    "cache": _Kind(
        lambda **options: Cached(ThriftConfig.for_cache(**{"budget": fraction(0.05), **options})),
        tuple(option for option in _OPTIONS if option not in ("compute", "normalize")),
        "this package's cache: pages of two precisions, 5% of the blocks (for answers only)",
    ),
    "snapkv": _Kind(
        Eviction, ("keep",), "forgets the tokens of the prompt that its end did not look at (for answers only)"
    ),
    **{
        name: _Kind(kind, tuple(option.name for option in fields(kind)), about)
        for name, (kind, about) in RIVALS.items()
    },
}


@dataclass(frozen=True)
class Method:
    """One row of an evaluation: a name and what it computes.

    Args:
        name: as it was asked for.
        config: of thrift attention; None for the model's own.
        evict: what becomes of the cache between prompt and answer.
        rival: somebody else's attention in place of the model's.
        cached: whether answers go through the paged cache; the prompt then too.
    """

    name: str
    config: ThriftConfig | None
    evict: Eviction | None = None
    rival: Rival | None = None
    cached: bool = False

    @property
    def plain(self) -> bool:
        """Whether this is the model as it is, which the others are compared with."""
        return self.config is None and self.evict is None and self.rival is None

    @property
    def family(self) -> str:
        """The name without its budget: methods of one family make one line in the plot."""
        kind, _, options = self.name.partition(":")
        kept = [option for option in words(options) if not option.startswith(("budget=", "keep=", "mass="))]
        return ":".join(filter(None, (kind, ",".join(kept))))


def described(method: Method) -> dict[str, Any] | None:
    """What a method computes as plain JSON values; None for the model as it is. Defaults change, records do not."""
    if method.evict is not None:
        return {"keep": method.evict.keep}
    if method.rival is not None:
        options = {option.name: getattr(method.rival, option.name) for option in fields(method.rival)}
        plain = {key: str(value) if isinstance(value, Budget) else value for key, value in options.items()}
        return {"rival": name_of(method.rival), **plain}
    options = method.config.to_dict() if method.config else None
    return {**options, "cached": True} if options is not None and method.cached else options


def from_description(name: str, options: dict[str, Any] | None) -> Method:
    """The inverse of `described`."""
    if options is not None and "keep" in options:
        return Method(name, None, Eviction(options["keep"]))
    if options is not None and "rival" in options:
        given = {
            key: Budget.parse(value) if key == "budget" else value for key, value in options.items() if key != "rival"
        }
        return Method(name, None, rival=RIVALS[options["rival"]][0](**given))
    if options is None:
        return Method(name, None)
    plain = {key: value for key, value in options.items() if key != "cached"}
    return Method(name, config_of(plain), cached="cached" in options)


def ignored_options(method: Method) -> list[str]:
    """Names of options that do nothing in what a method computes, see `thrift_attn.numerics`."""
    return list(PrefillNumerics.resolve(method.config).ignored) if method.config else []


def looks_ahead(method: Method) -> list[str]:
    """What the rounding of a token takes from later tokens of the text, see `PrefillNumerics.looks_ahead`."""
    return list(PrefillNumerics.resolve(method.config).looks_ahead) if method.config else []


def config_of(found: dict[str, Any]) -> ThriftConfig:
    """A configuration from `ThriftConfig.to_dict`; options that an old record does not know are off."""
    off = {"sink_token": "none", "smooth": "none", "normalize": "exact"}
    return ThriftConfig(**{**off, **current_names(found, warn=False), "budget": Budget.parse(found["budget"])})


def parse_method(spec: str) -> Method:
    """A method from ``kind`` or ``kind:option=value,option=value``.

    Raises:
        ValueError: an unknown kind or option, or a value that the configuration refuses.
    """
    kind, colon, rest = (piece.strip() for piece in spec.strip().partition(":"))
    if kind not in METHOD_KINDS:
        raise ValueError(f"unknown method {kind!r}: there are {', '.join(METHOD_KINDS)}")
    allowed = METHOD_KINDS[kind].options
    options: dict[str, Any] = {}
    pieces = (words(rest) or [""]) if colon else []
    for piece in pieces:
        key, equals, value = (side.strip() for side in piece.partition("="))
        key = OLD_NAMES.get(key, key)
        if key not in allowed:
            there = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            raise ValueError(f"method {kind!r} has no option {key!r}: {there}")
        if not equals or not value:
            raise ValueError(f"option {key!r} of method {kind!r} needs a value, as in {key}=...")
        if key in options:
            raise ValueError(f"option {key!r} of method {kind!r} is given twice")
        try:
            options[key] = _PARSERS[key](value)
        except ValueError as error:
            raise ValueError(f"method {spec!r}: option {key}: {error}") from error
    if options.get("base_format") == "auto":
        raise ValueError(f"method {spec!r}: a record names its format, such as nvfp4 or fp8, and does not say auto")
    try:
        made = METHOD_KINDS[kind].make(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"method {spec!r}: {error}") from error
    name = kind + (":" + ",".join(f"{key}={value}" for key, value in options.items()) if options else "")
    if isinstance(made, Cached):
        return Method(name, made.config, cached=True)
    if isinstance(made, Rival):
        return Method(name, None, rival=made)
    return Method(name, None, made) if isinstance(made, Eviction) else Method(name, made)


def parse_methods(text: str) -> list[Method]:
    """Methods from a comma-separated list; ``key=value`` pieces belong to the method before them.

    Raises:
        ValueError: nothing in the list, a method that `parse_method` refuses, or two that compute the same.
    """
    specs: list[str] = []
    for piece in words(text):
        if specs and re.match(r"\w+\s*=", piece):
            specs[-1] += ("," if ":" in specs[-1] else ":") + piece
        else:
            specs.append(piece)
    if not specs:
        raise ValueError(f"no method given: there are {', '.join(METHOD_KINDS)}")
    methods = [parse_method(spec) for spec in specs]
    check_distinct(methods)
    return methods


def check_distinct(methods: Iterable[Method]) -> None:
    """Raise ValueError when two methods compute the same thing."""
    seen: dict[Any, str] = {}
    for method in methods:
        computed = (method.config, method.evict, method.rival, method.cached)
        if computed in seen:
            raise ValueError(f"methods {seen[computed]!r} and {method.name!r} are the same computation; give one")
        seen[computed] = method.name


def sweep(methods: list[Method], budgets: list[Budget]) -> list[Method]:
    """The methods, and each that has a budget and does not name one, again at each of the budgets.

    Budgets that repeat what is already in the list are left out.
    """
    rows = list(methods)
    seen = {(method.config, method.cached) for method in methods}
    for method in methods:
        kind = method.name.partition(":")[0]
        if method.config is None or "budget" not in METHOD_KINDS[kind].options or "budget=" in method.name:
            continue
        for budget in budgets:
            if method.config.base_format == "drop" and budget.value == 0 and budget.kind in ("fraction", "top_k"):
                continue  # dropping every block leaves nothing to attend to
            config = method.config.with_(budget=budget)
            if (config, method.cached) not in seen:
                seen.add((config, method.cached))
                mark = "," if ":" in method.name else ":"
                rows.append(replace(method, name=f"{method.name}{mark}budget={budget}", config=config))
    return rows
