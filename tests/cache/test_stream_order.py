"""Pages that one CUDA stream used and another takes: the second waits for the first, and only then."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from thrift_attn.cache import PagedThriftCache
from thrift_attn.cache.stream_order import StreamOrder


@dataclass
class Recorded:
    """A stream that notes what it is asked for."""

    cuda_stream: int
    device: str = "cuda:0"
    events: int = 0
    waited: list[str] = field(default_factory=list)

    def record_event(self) -> str:
        self.events += 1
        return f"event {self.events} of {self.cuda_stream}"

    def wait_event(self, event: str) -> None:
        self.waited.append(event)


def test_a_stream_waits_for_the_others_and_not_for_itself(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    order, a, b = StreamOrder(), Recorded(1), Recorded(2)
    order.take(a)
    assert a.waited == []
    order.give_back([a])
    order.give_back([a])
    order.take(a)
    order.take(b)
    assert a.waited == []
    assert b.waited == ["event 2 of 1"]
    order.give_back([a, b])
    order.take(b)
    assert b.waited == ["event 2 of 1", "event 3 of 1"]
    order.take(None)


def test_pages_given_back_during_a_capture_are_waited_for_by_everyone(monkeypatch) -> None:
    order, a, b, waited = StreamOrder(), Recorded(1), Recorded(2), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    order.give_back([a])
    assert a.events == 0
    order.take(b)
    order.take(b)
    assert waited == ["cuda:0"]


@pytest.mark.gpu
@pytest.mark.parametrize("drop", ["free", "collect"])
def test_a_fork_in_another_stream_does_not_write_pages_that_are_still_read(drop: str) -> None:
    """The first stream is kept busy before it attends; what it reads must still be there when it comes to it."""
    device = torch.device("cuda")
    sizes = {"batch": 1, "kv_heads": 2, "head_dim": 64, "num_pages": 3, "dtype": torch.float16, "device": device}
    k, v = torch.randn(2, 1, 2, 128, 64, dtype=torch.float16, device=device)
    q = torch.randn(1, 4, 1, 64, dtype=torch.float16, device=device)
    wanted, first, second = [], torch.cuda.Stream(), torch.cuda.Stream()
    for busy in (0, 200_000_000):
        cache = PagedThriftCache(**sizes)
        other = cache.branch()
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            cache.append(k, v)
            torch.cuda._sleep(busy)
            out = cache.attend(q)
            if drop == "free":
                cache.free(0)
        del cache
        with torch.cuda.stream(second):
            other.append(100 * k, 100 * v)
        torch.cuda.synchronize()
        wanted.append(out)
    assert torch.equal(*wanted)
