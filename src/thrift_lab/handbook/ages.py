"""Which records are older than the default that they speak for, and what has changed since."""

from __future__ import annotations

from datetime import datetime, timezone

from thrift_attn import ThriftConfig

FIRST_TOKEN_EXACT = datetime(2026, 11, 26, tzinfo=timezone.utc)
"""From here on the first token is exact in the kernels of prefill and decode."""

MARK = "†"
OLD = "recorded before the first token was exact, which today's default has"


def timed_before_default(created: str) -> bool:
    """Whether a record of speed was made before the first token became exact."""
    return datetime.fromisoformat(created) < FIRST_TOKEN_EXACT


def scored_before_default(config: ThriftConfig) -> bool:
    """Whether what a record calls the default of this package was computed with other options than today's.

    Budgets, formats and storage are what rows of a table differ in; they are not compared.
    """
    today = ThriftConfig()
    asked = ("center", "sink_token", "smooth", "scales", "normalize", "score", "force_first", "force_last")
    return any(getattr(config, name) != getattr(today, name) for name in asked)
