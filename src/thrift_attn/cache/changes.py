"""Changes of a cache that must come to their end: what is interrupted halfway is noticed at the next step."""

from __future__ import annotations

from types import TracebackType


class Changes:
    """Whether a change was begun and not ended. A change is made in a ``with`` block of the object; blocks do not nest.

    Args:
        advice: what to do after an interrupt; the end of the error's sentence.
        refusals: errors by which an argument is refused before anything is changed: they leave all as it was.

    Attributes:
        unfinished: True between the beginning and the end of a change, and for good after one that was interrupted.
    """

    def __init__(self, advice: str, refusals: tuple[type[Exception], ...] = ()):
        self.advice, self.refusals = advice, refusals
        self.unfinished = False

    def check(self) -> None:
        """Raise RuntimeError if a change was interrupted halfway."""
        if self.unfinished:
            raise RuntimeError(
                f"a change of this cache was interrupted halfway, and what it holds is not known: {self.advice}"
            )

    def anew(self) -> Changes:
        """Return the same for a copy of what is changed, which no change has interrupted."""
        return Changes(self.advice, self.refusals)

    def __enter__(self) -> None:
        self.check()
        self.unfinished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, self.refusals):
            self.unfinished = False
