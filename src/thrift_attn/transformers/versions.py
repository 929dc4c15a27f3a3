"""The versions of transformers that are served."""

from __future__ import annotations

import inspect

from torch import nn

try:
    import transformers
except ImportError as error:
    raise ImportError('thrift_attn.transformers needs transformers >= 5.0: pip install "thrift-attn[hf]"') from error

SUPPORTED = ((5, 0), (5, 24))
"""The oldest and the newest minor version that the tests run with."""


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


VERSION = _minor(transformers.__version__)
"""Major and minor version of the transformers that is installed."""

RANGE = " to ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
"""The supported range, for people."""


if SUPPORTED[0] > VERSION:
    raise ImportError(f"thrift_attn.transformers needs transformers {RANGE}, got {transformers.__version__}")


def cache_keyword(model: nn.Module) -> str:
    """The name under which a model takes a cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
