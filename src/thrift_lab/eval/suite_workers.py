"""Several processes that measure the samples of one suite, each with a model of its own; one process writes the folder."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.multiprocessing as processes

from thrift_lab.console import silent
from thrift_lab.eval.suite_folder import Key, SuitePlan
from thrift_lab.eval.suite_samples import Measurer, Samples

Todo = list[tuple[int, list[Key]]]
"""Numbers of items of `Samples`, with what is still to be measured on each."""


def spread(
    plan: SuitePlan, folder: Path, todo: Todo, device: str, dtype: str, workers: int
) -> Iterator[dict[str, Any]]:
    """Measure in several processes: whoever is free takes the next sample.

    Args:
        plan: of the suite.
        folder: of the run.
        todo: what is to be measured.
        device: see `thrift_lab.models.load_model`; without a number, process n takes the GPU n modulo their number.
        dtype: see `thrift_lab.models.load_model`.
        workers: processes.

    Yields:
        The environment of the first that is ready, then lines as they come.

    Raises:
        RuntimeError: a process was killed.
        Exception: what a process raised.
    """
    context = processes.get_context("spawn")  # CUDA does not survive a fork
    jobs, answers = context.Queue(), context.Queue()
    for job in (*todo, *[None] * workers):
        jobs.put(job)
    made = [
        context.Process(target=_work, args=(plan, folder, device, dtype, number, workers, jobs, answers), daemon=True)
        for number in range(workers)
    ]
    try:
        for process in made:
            process.start()
        waiting, environment = workers, None
        while waiting:
            kind, content = _next(answers, made)
            if kind == "error":
                raise content
            if kind == "line":
                yield content
            elif kind == "done":
                waiting -= 1
            elif environment is None:
                environment = {**content, "workers": workers}
                yield environment
    finally:
        jobs.cancel_join_thread()  # what nobody takes any more
        for process in made:
            if process.pid is not None:
                process.terminate()
                process.join()


def _next(answers: Any, made: list[Any]) -> tuple[str, Any]:
    """Wait for the next answer of a process that lives."""
    while True:
        with suppress(Empty):
            return answers.get(timeout=1)
        for number, process in enumerate(made):
            if process.exitcode:
                raise RuntimeError(
                    f"worker {number} ended with exit code {process.exitcode}: what it was measuring is lost, the rest is "
                    "kept; start again to go on, with fewer workers if memory was short"
                )


def _work(
    plan: SuitePlan, folder: Path, device: str, dtype: str, number: int, workers: int, jobs: Any, answers: Any
) -> None:
    """Load a model and measure until there is nothing left; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that writes ends the others
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(number % torch.cuda.device_count())
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
        measurer = Measurer.of(plan, Samples.of(plan, folder, silent), device, dtype, silent)
        lines = measurer.lines(iter(jobs.get, None))
        answers.put(("environment", next(lines)))
        for line in lines:
            answers.put(("line", line))
        answers.put(("done", None))
    except Exception as error:  # whatever it is, it is told where the run was started
        answers.put(("error", _portable(error)))


def _portable(error: Exception) -> Exception:
    """An error that another process can be given."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class whose arguments are not those of its message
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
