"""What commands that measure one model on one text begin with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from thrift_lab import models
from thrift_lab.console import Log, kept, shown
from thrift_lab.eval.texts import Text, load_text
from thrift_lab.models import Loaded


@contextmanager
def opened(model: str, text: str, chars: int, *, device: str, dtype: str) -> Iterator[tuple[Loaded, Text, Log]]:
    """Load a model and a text, and show on stderr what runs until the block ends.

    Args:
        model: see `thrift_lab.models.load_model`.
        text: see `thrift_lab.eval.texts.load_text`.
        chars: that a dataset is read for.
        device: see `thrift_lab.models.load_model`.
        dtype: see `thrift_lab.models.load_model`.

    Yields:
        The model, the text and a `Log` for lines that stay.

    Raises:
        ValueError, FileNotFoundError, FetchError, MissingExtra: see both.
    """
    console = Console(stderr=True)
    with shown(console) as (log, _):
        loaded = models.load_model(model, device=device, dtype=dtype, log=log)
        yield loaded, load_text(text, chars, log), kept(console, log)
