"""Order between CUDA streams that used the pages of a pool and those that take the pages over.

The books of a pool are kept on the host: a page is free as soon as its sequence is, while kernels that read it may still run.
In one stream whoever writes the page next comes after them. Caches that share a pool (`PagedThriftCache.branch`, forks of
`ThriftCache`) may run in several streams. There the stream that takes pages waits, on the device, for those that gave them
back, as PyTorch's caching allocator does for tensors that were recorded in another stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream in use on a CUDA device; None on a CPU and while dynamo traces."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return torch.cuda.current_stream(device)


class StreamOrder:
    """What a pool knows of the streams in which its pages were used. One object serves all caches over the pool."""

    def __init__(self) -> None:
        self._given_back: dict[int, Any] = {}  # by stream: the event behind the last use of pages it gave back
        self._unknown = False  # pages were given back while a graph was being captured, where no event can be recorded

    def give_back(self, users: Iterable[Any]) -> None:
        """Note that pages are free which these streams used.

        Args:
            users: streams (`torch.cuda.Stream`) in which the pages were read or written; none on a CPU.
        """
        for stream in users:
            if torch.cuda.is_current_stream_capturing():
                self._unknown = True
            else:
                self._given_back[stream.cuda_stream] = stream.record_event()

    def take(self, stream: Any | None) -> None:
        """Let a stream wait for all others that gave back pages.

        Args:
            stream: in which pages are written from now on; None on a CPU.
        """
        if stream is None:
            return
        if self._unknown:
            torch.cuda.synchronize(stream.device)
            self._unknown = False
        for number, event in self._given_back.items():
            if number != stream.cuda_stream:
                stream.wait_event(event)
