"""Whether a record speaks for today's defaults: what a method's name means now, against what was computed then."""

from __future__ import annotations

from typing import Any

from thrift_attn.config import OLD_NAMES, ThriftConfig
from thrift_lab.console import words
from thrift_lab.eval.methods import parse_method
from thrift_lab.records import MARK


def older(name: str, options: dict[str, Any] | None) -> str:
    """Say in which options a recorded method is not what its name means today; empty where it is the same.

    Args:
        name: of the method, as it was asked for.
        options: what was computed, as `ThriftConfig.to_dict` gives it, or None for the model as it is.
    """
    if options is None:
        return ""
    try:
        now = parse_method(name.removesuffix(MARK)).config
    except ValueError as error:
        return f"is no method any more: {error}"
    if now is None:
        return ""
    today = now.to_dict()
    differing = [
        f"{key}={options[key]} (today {value})"
        for key, value in today.items()
        if key in options and options[key] != value and key != "exact_below"
    ]
    return ", ".join(differing)


def marked(name: str, options: dict[str, Any] | None) -> str:
    """Return the name in today's words, with `MARK` behind it where the record is older than the default."""
    return in_todays_words(name.removesuffix(MARK)) + (MARK if older(name, options) else "")


def in_todays_words(name: str) -> str:
    """Return the name of a method with the options that have another name today under that."""
    kind, colon, options = name.partition(":")
    pairs = (option.partition("=") for option in words(options))
    return kind + colon + ",".join(f"{OLD_NAMES.get(key, key)}{equals}{value}" for key, equals, value in pairs)


def scored_before_default(config: ThriftConfig) -> bool:
    """Whether what a record calls the default of this package was computed with other options than today's.

    Budgets, formats and storage are what rows of a table differ in; they are not compared.
    """
    today = ThriftConfig()
    asked = ("center", "sink_token", "smooth", "scales", "normalize", "score", "force_first", "force_last")
    return any(getattr(config, name) != getattr(today, name) for name in asked)
