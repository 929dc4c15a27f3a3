"""A long fuzz as a record: episode after episode, each with a setting and operations that its number and the seed decide."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

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
from thrift_lab.sheet import Sheet

ROOMS = ("cache", "reference")
"""Folders of ``thrift_attn`` whose sources a record of a CPU speaks for."""

EPISODE = 150
"""Operations of an episode."""

MOST_FINDINGS = 20
"""Findings after which a campaign ends."""


class Found(BaseModel):
    """A law that did not hold.

    Args:
        episode: its number; with the seed and the settings of the record it decides everything.
        operation: the number of the operation in its episode.
        what: the law, the setting and the last operations.
    """

    episode: int
    operation: int
    what: str


class FuzzRecord(Record):
    """What a campaign has done and found, and for which sources."""

    kind: str = "fuzz"
    sources: str = ""
    seed: int = 0
    episodes: int = 0
    operations: int = 0
    interrupts: int = 0
    counts: dict[str, int] = Field(default_factory=dict)
    findings: list[Found] = Field(default_factory=list)
    seconds: float = 0.0

    def table(self) -> Sheet:
        """See `Record.table`: how often each operation was done."""
        found = [f"episode {one.episode}: {one.what.splitlines()[0]}" for one in self.findings]
        return Sheet(
            ("operation", "done"),
            [(name, f"{count:,}") for name, count in self.counts.items()],
            f"{self.operations:,} operations and {self.interrupts:,} interrupts in {self.episodes:,} episodes",
            "\n".join(found) or "nothing found",
        )


class Episode(NamedTuple):
    """What was done in an episode.

    Args:
        done: how often each operation was done.
        interrupts: how many KeyboardInterrupts were raised inside the library.
        found: the law that did not hold, if there is one.
    """

    done: Counter[str]
    interrupts: int
    found: Found | None


@dataclass(frozen=True)
class Campaign:
    """How long a fuzz takes.

    Args:
        operations: to be done.
        interrupts: KeyboardInterrupts to be raised inside the library, on top of all else.
        seed: of everything that is drawn.
        minutes: the first episode that ends after them is the last; None for no limit.
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

    @property
    def share(self) -> float:
        """The share of operations that are to be interrupted; about half of them have the line where they are."""
        return min(0.5, 2.5 * self.interrupts / self.operations)

    def play(self, number: int) -> Episode:
        """Play an episode."""
        rng = random.Random(f"{self.seed}-{number}")
        machine, found = Machine(Setting.draw(rng, self.device)), None
        try:
            for _ in range(EPISODE):
                name, arguments = draw_interrupted(rng) if rng.random() < self.share else draw_operation(rng)
                machine.apply(name, **arguments)
        except Finding as error:
            found = Found(episode=number, operation=len(machine.log), what=str(error))
        return Episode(machine.done, machine.interrupts, found)

    def run(self, progress: Progress = unseen, *, workers: int = 1, most_findings: int = MOST_FINDINGS) -> FuzzRecord:
        """Play episodes until enough is done.

        Args:
            progress: called after each of them.
            workers: processes that play them.
            most_findings: after so many it ends.
        """
        began, counts, record = time.monotonic(), Counter[str](), FuzzRecord(seed=self.seed)
        limit = None if self.minutes is None else began + 60 * self.minutes
        for episode in self._episodes(workers):
            record.findings += [] if episode.found is None else [episode.found]
            record.episodes += 1
            record.operations += sum(episode.done.values())
            record.interrupts += episode.interrupts
            counts += episode.done
            told = (
                f"{record.operations:,} operations, {record.interrupts:,} interrupts, {len(record.findings)} findings"
            )
            progress(told, min(record.operations, self.operations), self.operations)
            done = record.operations >= self.operations and record.interrupts >= self.interrupts
            if done or len(record.findings) >= most_findings or (limit is not None and time.monotonic() > limit):
                break
        record.counts = dict(counts.most_common())
        record.seconds = round(time.monotonic() - began, 1)
        record.sources = digest_of_sources(Path(thrift_attn.__file__).parent, ROOMS)
        record.context = make_context(("torch", "triton"), settings={**asdict(self), "workers": workers})
        return record

    def _episodes(self, workers: int) -> Iterator[Episode]:
        """Play episodes without end, in order."""
        if workers == 1:
            yield from map(self.play, itertools.count())
            return
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            waiting = deque(pool.submit(self.play, number) for number in range(2 * workers))
            try:
                for number in itertools.count(2 * workers):
                    yield waiting.popleft().result()
                    waiting.append(pool.submit(self.play, number))
            finally:
                pool.shutdown(cancel_futures=True)
