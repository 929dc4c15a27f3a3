"""Imports of optional packages that fail with the command that installs them."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """An optional package is not installed."""


def need(module: str, extra: str = "eval") -> ModuleType:
    """Import an optional module.

    Args:
        module: its import name.
        extra: the extra of this distribution that brings it.

    Returns:
        The module.

    Raises:
        MissingExtra: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtra(f"{error.name} is not installed: pip install 'thrift-attn[{extra}]'", name=module) from error


def missing(module: str, extra: str = "eval") -> str | None:
    """What `need` would complain about, or None."""
    try:
        need(module, extra)
    except MissingExtra as error:
        return str(error)
    return None
