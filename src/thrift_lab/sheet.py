"""Tables as text: made once, shown on a terminal or written as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 16
"""Characters that a column of words has room for on the narrowest terminal, before it is folded."""


@dataclass(frozen=True)
class Sheet:
    """A table.

    Args:
        head: names of the columns.
        rows: cells of each row, one for each column.
        title: of all of it; on a terminal alone.
        caption: what a reader has to know besides; on a terminal alone.
        left: how many columns hold words; those behind them hold numbers and are aligned right.
        styles: how a terminal shows a row, by its index, in rich's words: ``"bold"``, ``"dim"``.

    Raises:
        ValueError: a row of more or fewer cells than there are columns.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    left: int = 1
    styles: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"expected {len(self.head)} cells, one for each column, got {list(row)}")

    def drawn(self) -> Table:
        """Return what rich prints."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=escape(self.title) or None,
            caption=escape(self.caption) or None,
            title_style="bold",
            caption_style="dim",
            caption_justify="left",
            box=None,
            padding=(0, 1),
            header_style="bold",
        )
        for at, name in enumerate(self.head):
            if at < self.left:
                longest = max((len(row[at]) for row in self.rows), default=0)
                table.add_column(escape(name), overflow="fold", vertical="bottom", min_width=min(WIDTH, longest))
            else:
                table.add_column(escape(name), justify="right", no_wrap=True, vertical="bottom")
        for at, row in enumerate(self.rows):
            table.add_row(*map(escape, row), style=self.styles.get(at))
        return table

    def markdown(self, *, code: bool = False) -> str:
        """Return lines of Markdown, without an end of line behind the last.

        Args:
            code: whether the first column is set as code.
        """
        rows = [[f"`{first}`" if code else first, *rest] for first, *rest in self.rows]
        lines = [f"| {' | '.join(' '.join(cell.split()) for cell in row)} |" for row in (self.head, *rows)]
        return "\n".join([lines[0], "|" + "---|" * len(self.head), *lines[1:]])
