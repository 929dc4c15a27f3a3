"""What a user of an engine may ask for, read from ``--additional-config '{"thrift": {...}}'``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from thrift_attn.config import Budget, SinkToken, ThriftConfig

SECTION = "thrift"
"""The key of our options in the engine's additional configuration."""

ONES = "ones"
"""What ``scales`` is where K and V shall not be scaled."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options of the section ``thrift``.

    Args:
        budget: how many blocks are promoted, in prompts and in decode: see `ThriftConfig`.
        residual_share: the share of blocks that keep what promoted blocks are stored as. So far 1, all of them.
        sink_token: whether the first token of a sequence is exact: see `ThriftConfig`.
        scales: the file of powers of two that ``thrift calibrate MODEL`` wrote; ``"ones"`` for none; None: they are taken from
            the model when the engine starts.

    Raises:
        ValueError: an option out of range or of no meaning.
        TypeError: a value of the wrong type.
        FileNotFoundError: no such file of scales.
        NotImplementedError: a residual share below 1.
    """

    budget: str = str(ThriftConfig().budget)
    residual_share: float = 1.0
    sink_token: SinkToken = "exact"
    scales: str | None = None

    def __post_init__(self) -> None:
        if self.scales is not None and not isinstance(self.scales, str):
            raise TypeError(f"scales must be a path, {ONES!r} or null, got {type(self.scales).__name__}")
        if self.scales not in (None, ONES) and not Path(self.scales).is_file():  # before weights are read for minutes
            raise FileNotFoundError(
                f"scales must be a file that thrift calibrate MODEL wrote, {ONES!r} or null: there is no file {self.scales!r}"
            )
        self.for_pages()  # checks the others
        if self.residual_share != 1:
            raise NotImplementedError(
                f"pages of an engine keep all residuals so far: residual_share must be 1, got {self.residual_share}"
            )

    @classmethod
    def read(cls, additional_config: Any) -> EngineOptions:
        """Return the options in an engine's additional configuration.

        Args:
            additional_config: the engine's own; all but its entry ``thrift`` belongs to others.

        Raises:
            ValueError: an option that there is not.
            TypeError: a section that is no mapping.
        """
        section = additional_config.get(SECTION, {}) if isinstance(additional_config, dict) else {}
        if not isinstance(section, dict):
            raise TypeError(f"the section {SECTION!r} must hold options by name, got {type(section).__name__}")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(section) - set(known)):
            raise ValueError(
                f"unknown option {', '.join(map(repr, unknown))} in the section {SECTION!r}: there are {', '.join(known)}"
            )
        options = dict(section)
        if "budget" in options:
            options["budget"] = str(Budget.of(options["budget"]))
        return cls(**options)

    def for_prompts(self) -> ThriftConfig:
        """What attention over K and V just made computes."""
        return ThriftConfig(budget=self.budget, sink_token=self.sink_token)

    def for_pages(self) -> ThriftConfig:
        """What pages store and decode computes."""
        return ThriftConfig.for_cache(
            budget=self.budget,
            sink_token=self.sink_token,
            residual_share=self.residual_share,
            smooth="none" if self.scales == ONES else "channel",
        )
