"""Times on a CUDA device: graph replays between events, and what the device itself can do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]
"""One call; a whole step returns ``[B, Hq, Tq, D]``, a single kernel may return anything."""

GRAPH_US = 1000.0
"""A graph holds so many steps that a replay takes about this long or longer: launching it and the events cost a few us."""


class DeviceLost(RuntimeError):
    """A kernel broke the CUDA context: nothing further can run in this process."""


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Args:
        replays: timed replays of a graph, each one run of the record.
        warmup: replays before them.
        trial_replays: timed replays when settings of a baseline are compared with each other.
    """

    replays: int = 50
    warmup: int = 10
    trial_replays: int = 9


def require_cuda() -> torch.device:
    """The current CUDA device.

    Raises:
        NotImplementedError: there is none.
    """
    if not torch.cuda.is_available():
        raise NotImplementedError(
            f"thrift bench times kernels and needs a CUDA device; torch {torch.__version__} sees none on this machine"
        )
    return torch.device("cuda", torch.cuda.current_device())


def check_alive(what: str) -> None:
    """Raise DeviceLost if an error before this point left the device unusable."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(f"{what}: {error}") from error


def time_steps(steps: Sequence[Step], *, replays: int, warmup: int) -> tuple[list[float], Any]:
    """Microseconds of one step, from replays of a CUDA graph that walks through all steps.

    Args:
        steps: the same computation on different data; the graph runs them one after the other, so that data larger than
            L2 in all is never found there.
        replays: timed replays.
        warmup: replays before them.

    Returns:
        Microseconds per step of every replay, and a copy of the tensor that the first captured call
        returned (None if it returned something else).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever a first call allocates, compiles or plans stays out of the capture
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()

    rounds = max(1, round(GRAPH_US / max(1.0, _eager_us(steps))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first, *_ = [step() for _ in range(rounds) for step in steps]
    for _ in range(warmup):
        graph.replay()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    torch.cuda.synchronize()
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    runs = [start.elapsed_time(end) * 1e3 / (rounds * len(steps)) for start, end in marks]
    return runs, first.clone() if isinstance(first, Tensor) else None  # the graph's memory goes with the graph


def _eager_us(steps: Sequence[Step]) -> float:
    """Microseconds of one walk through all steps, launched one by one."""
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for step in steps:
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
        if times[0] > 10 * GRAPH_US:  # one walk fills a graph, however exactly it is known
            break
    return min(times)


def copy_bandwidth(size: int = 2 << 30, replays: int = 20) -> float:
    """Bytes per second of a device-to-device copy, bytes read and written both counted; the median of the replays."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    runs, _ = time_steps([lambda: target.copy_(source)], replays=replays, warmup=3)
    return 2 * size / statistics.median(runs) * 1e6


def matmul_rate(size: int = 8192, replays: int = 10) -> float:
    """FLOP per second of a bfloat16 matrix product of random data; the median of the replays."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    runs, _ = time_steps([lambda: a @ b], replays=replays, warmup=5)
    return 2 * size**3 / statistics.median(runs) * 1e6


def kernel_profile(step: Step, rounds: int = 5) -> dict[str, float]:
    """Microseconds per call of every kernel that one step launches, by the kernel's name.

    Args:
        step: launched ``rounds`` times, not as a graph.
        rounds: calls.
    """
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            step()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / rounds
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    }
