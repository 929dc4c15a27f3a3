"""Changes of a cache that must come to their end: what is interrupted halfway is noticed at the next step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Changes:
    """Whether a change was begun and not ended.

    Attributes:
        unfinished: True between the beginning and the end of a change, and for good after one that was interrupted.
    """

    def __init__(self) -> None:
        self.unfinished = False

    def check(self) -> None:
        """Raise RuntimeError if a change was interrupted halfway."""
        if self.unfinished:
            raise RuntimeError(
                "a change of this cache was interrupted halfway, and what it holds is not known: call reset() and start again"
            )

    @contextmanager
    def change(self) -> Iterator[None]:
        """Do a change inside. Wrong arguments are told before anything is changed, so their errors leave all as it was.

        Raises:
            RuntimeError: an earlier change was interrupted halfway.
        """
        self.check()
        self.unfinished = True
        try:
            yield
        except (ValueError, TypeError, NotImplementedError):
            self.unfinished = False
            raise
        self.unfinished = False
