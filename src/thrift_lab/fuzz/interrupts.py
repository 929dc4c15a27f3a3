"""KeyboardInterrupt before any line of the library, as a Ctrl-C may come."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import thrift_attn

PACKAGE = str(Path(thrift_attn.__file__).parent)


@functools.cache
def _with_lines(file: str) -> frozenset[int]:
    """The lines of a source file on which a with statement begins."""
    return frozenset(node.lineno for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.With))


def _is_dropping(frame: FrameType | None) -> bool:
    """Whether a frame is below ``__del__``."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


class Interrupter:
    """Runs a change, counts its lines in frames of the library, and may raise KeyboardInterrupt before one of them.

    A line on which a ``with`` block ends counts as its line once more for a tracer, but no signal comes between the end of
    the block and the release of what it holds (a call of C code), so none is raised there. Neither is one in ``__del__``,
    where Python ignores it.

    Args:
        folder: only files below it count; by default the library.
    """

    def __init__(self, folder: str = PACKAGE):
        self.folder = folder

    def run(self, change: Callable[[], Any], at: int | None = None) -> tuple[Any, int]:
        """Return what a change returns and the number of its lines.

        Args:
            change: what to run.
            at: the line, counted from 1, before which KeyboardInterrupt is raised; None for no interrupt.

        Raises:
            KeyboardInterrupt: the change has a line ``at``.
        """
        lines = 0
        blocks: dict[int, tuple[FrameType, set[int]]] = {}  # the with blocks that a frame is in; the frame keeps its id

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            code = frame.f_code
            if not code.co_filename.startswith(self.folder) or (event == "call" and _is_dropping(frame)):
                return None
            if event == "return" and not code.co_flags & inspect.CO_GENERATOR:
                blocks.pop(id(frame), None)
            elif event == "line":
                if frame.f_lineno in _with_lines(code.co_filename):
                    _, mine = blocks.setdefault(id(frame), (frame, set()))
                    if frame.f_lineno in mine:
                        mine.remove(frame.f_lineno)
                        return trace
                    mine.add(frame.f_lineno)
                lines += 1
                if lines == at:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            found = change()
        finally:
            sys.settrace(before)
            blocks.clear()  # frames hold the tracer, which holds this: nothing of the change may outlive it
        return found, lines
