"""A long fuzz as a record: episode after episode, each with a setting and operations that its number and the seed decide."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field

import thrift_attn
from thrift_lab.console import Progress, unseen
from thrift_lab.fuzz.draws import draw_interrupted, draw_operation
from thrift_lab.fuzz.laws import Finding
from thrift_lab.fuzz.machine import Machine
from thrift_lab.fuzz.settings import Setting
from thrift_lab.provenance import digest_of_sources
from thrift_lab.records import Record, make_context

ROOMS = ("cache", "reference")
"""Folders of ``thrift_attn`` whose sources a record of a CPU speaks for."""

EPISODE = 150
"""Operations of an episode."""

MOST_FINDINGS = 20
"""Findings after which a campaign ends."""


class Found(BaseModel):
    """A law that did not hold.

    Args:
        episode: its number; with the seed of the record it decides everything.
        share: of its operations, those that were to be interrupted; it decides, too.
        operation: the number of the operation in its episode.
        what: the law, the setting and the last operations.
    """

    episode: int
    share: float
    operation: int
    what: str


class FuzzRecord(Record):
    """What a campaign has done and found, and for which sources."""

    KINDS: ClassVar[tuple[str, ...]] = ("fuzz",)

    kind: str = "fuzz"
    sources: str = ""
    seed: int = 0
    episodes: int = 0
    operations: int = 0
    interrupts: int = 0
    counts: dict[str, int] = Field(default_factory=dict)
    findings: list[Found] = Field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Campaign:
    """How long a fuzz takes.

    Args:
        operations: to be done.
        interrupts: KeyboardInterrupts to be raised inside the library, on top of all else.
        seed: of everything that is drawn.
        minutes: no episode begins after them; None for no limit.
        device: where the caches live.
    """

    operations: int
    interrupts: int = 0
    seed: int = 0
    minutes: float | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.operations < 1 or self.interrupts < 0:
            raise ValueError(
                f"expected at least 1 operation and 0 interrupts, got {self.operations}, {self.interrupts}"
            )

    def play(self, number: int, share: float = 0.0) -> tuple[Machine, Found | None]:
        """Play an episode.

        Args:
            number: of the episode.
            share: of its operations, those that are interrupted.

        Returns:
            The machine, and the law that did not hold, if there is one.
        """
        rng = random.Random(f"{self.seed}-{number}")
        machine = Machine(Setting.draw(rng, self.device))
        try:
            for _ in range(EPISODE):
                name, arguments = draw_interrupted(rng) if rng.random() < share else draw_operation(rng)
                machine.apply(name, **arguments)
        except Finding as error:
            return machine, Found(episode=number, share=share, operation=len(machine.log), what=str(error))
        return machine, None

    def run(self, progress: Progress = unseen, *, most_findings: int = MOST_FINDINGS) -> FuzzRecord:
        """Play episodes until enough is done.

        Args:
            progress: called after each of them.
            most_findings: after so many it ends.
        """
        began, counts, record = time.monotonic(), Counter[str](), FuzzRecord(seed=self.seed)
        limit = None if self.minutes is None else began + 60 * self.minutes
        while record.operations < self.operations or record.interrupts < self.interrupts:
            if (limit is not None and time.monotonic() > limit) or len(record.findings) >= most_findings:
                break
            machine, found = self.play(record.episodes, self._share(record))
            record.findings += [] if found is None else [found]
            record.episodes += 1
            record.operations += len(machine.log)
            record.interrupts += machine.interrupts
            counts += machine.done
            told = (
                f"{record.operations:,} operations, {record.interrupts:,} interrupts, {len(record.findings)} findings"
            )
            progress(told, min(record.operations, self.operations), self.operations)
        record.counts = dict(counts.most_common())
        record.seconds = round(time.monotonic() - began, 1)
        record.sources = digest_of_sources(Path(thrift_attn.__file__).parent, ROOMS)
        record.context = make_context(("torch", "triton", "hypothesis"), settings=self._told())
        return record

    def _share(self, record: FuzzRecord) -> float:
        """The share of operations of the next episode that are interrupted; most of them have the line where they are."""
        left = max(EPISODE, self.operations - record.operations)
        return min(0.5, 1.5 * max(0, self.interrupts - record.interrupts) / left)

    def _told(self) -> dict[str, Any]:
        return {"operations": self.operations, "interrupts": self.interrupts, "device": self.device,
                "threads": torch.get_num_threads()}  # fmt: skip
