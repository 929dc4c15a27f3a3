"""Start an engine in a process of its own, and hear what it finds as soon as it has found it."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from thrift_lab.serving.engine_jobs import EngineJob

TAIL = 1500
"""Characters of an engine's last words that a reason holds."""

PATIENCE_S = 20.0
"""Seconds that an engine may take to end."""


class EngineFailed(RuntimeError):
    """An engine did not start, or ended before its tasks were done.

    Args:
        reason: its last words.
        task: the number of the task that it was at; None where it did not start.
    """

    def __init__(self, reason: str, task: int | None):
        super().__init__(reason)
        self.reason, self.task = reason, task


def run_engine(
    job: EngineJob,
    log: Path,
    *,
    seconds: float,
    on_start: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run the tasks of a job; the engine is gone when this ends, however it ends.

    Args:
        job: the engine and its tasks.
        log: where the engine writes; earlier lines stay.
        seconds: that its start, or one of its tasks, may take.
        on_start: called with what the engine says of its memory.

    Yields:
        The number of a task and what was found.

    Raises:
        EngineFailed: it ended too soon, or took too long.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    at: int | None = None
    with tempfile.TemporaryDirectory() as folder, log.open("a") as words:
        path = Path(folder) / "job.json"
        path.write_text(job.model_dump_json())
        reading, writing = os.pipe()
        began = log.stat().st_size
        process = subprocess.Popen(
            [sys.executable, "-m", "thrift_lab.serving.engine_child", str(path), str(writing)],
            stdout=words, stderr=subprocess.STDOUT, pass_fds=(writing,), start_new_session=True,
            env=job.environment(),
        )  # fmt: skip
        os.close(writing)
        try:
            for event in _events(process, reading, seconds):
                if "started" in event:
                    on_start(event["started"])
                at = event.get("begins", at)
                if "done" in event:
                    yield event["done"], event["result"]
                if "over" in event:
                    return
        except TimeoutError as error:
            raise EngineFailed(str(error), at) from error
        finally:
            os.close(reading)
            _end(process)
        raise EngineFailed(_last_words(log, began), at)


def _events(process: subprocess.Popen[bytes], reading: int, seconds: float) -> Iterator[dict[str, Any]]:
    """What a process tells, until it ends.

    A process that it left behind may hold the other end of the pipe open: so its own end counts, not that of the pipe.
    """
    held, limit = b"", time.monotonic() + seconds
    with selectors.DefaultSelector() as waiting:
        waiting.register(reading, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # before the last look at what it has told
            if waiting.select(0 if ended else 0.5):
                piece = os.read(reading, 1 << 20)
                *lines, held = (held + piece).split(b"\n")
                for line in lines:
                    limit = time.monotonic() + seconds
                    yield json.loads(line)
                if piece:
                    continue
            if ended:
                return
            if time.monotonic() > limit:
                raise TimeoutError(f"nothing was heard of the engine for {seconds:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started: they hold a GPU."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and (process.poll() is None or _lives(process.pid)):
            time.sleep(0.1)


def _lives(group: int) -> bool:
    """Whether a process of a group runs; one that nobody has asked for its end does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended just now
            state, _, found = path.read_text().rpartition(")")[2].split()[:3]
            if int(found) == group and state not in "ZX":
                return True
    return False


def _last_words(log: Path, began: int) -> str:
    """The end of what an engine wrote: from its last exception on, if there is one."""
    with log.open("rb") as file:
        file.seek(began)
        said = file.read().decode(errors="replace").strip()
    lines = said.splitlines()
    errors = [line for line in lines if "Error" in line and ":" in line]
    return (errors[-1] if errors else said)[-TAIL:] or "the engine ended without a word"
