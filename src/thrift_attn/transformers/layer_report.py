"""How the layers of a model were computed: `report`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from thrift_attn.stats import Stats
from thrift_attn.transformers.layer_state import ServedBy, check_enabled, dispatches, find_state, layer_idx


@dataclass(frozen=True)
class LayerRow:
    """One way in which one attention layer was computed.

    Args:
        layer: its ``layer_idx``; None if it has none.
        name: dotted name of the module in the model.
        served_by: ``"thrift"``; ``"exact"``, exact attention by thrift's choice, since it is faster; ``"sdpa"`` or ``"eager"``,
            what thrift does not serve; or None before the first call.
        reason: why.
        calls: number of calls since `enable`.
        stats: their statistics added up, all zero if not served by thrift or not counted (see `enable`).
    """

    layer: int | None
    name: str
    served_by: ServedBy | None
    reason: str
    calls: int = 0
    stats: Stats = field(default_factory=Stats)


class Report(list[LayerRow]):
    """Rows of `report`; ``print`` shows them as a table."""

    @property
    def stats(self) -> Stats:
        """Statistics of all layers added up."""
        return sum((row.stats for row in self), Stats())

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            ("layer", "module", "served by", "calls", "promoted", "high mass", "reason"),
        ]
        for row in self:
            counted = row.stats.visible > 0
            table.append(
                (
                    "-" if row.layer is None else str(row.layer),
                    row.name,
                    row.served_by or "-",
                    str(row.calls),
                    f"{row.stats.share:.2%}" if counted else "-",
                    f"{row.stats.high_mass:.2%}" if counted else "-",
                    row.reason,
                )
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def report(model: nn.Module) -> Report:
    """How every attention layer of a model was computed since `enable`.

    Args:
        model: a transformers model that uses thrift.

    Returns:
        A list of `LayerRow` in the order of the layers, one for each path and reason; ``print`` shows a table.

    Raises:
        TypeError: something else than a transformers model.
        ValueError: the model does not use thrift.
    """
    check_enabled(model)
    rows = Report()
    for name, module in model.named_modules():
        state = find_state(module)
        for (served_by, reason), tally in (state.tallies if state else {}).items():
            rows.append(LayerRow(layer_idx(module), name, served_by, reason, tally.calls, tally.stats))
        if dispatches(module) and not (state and state.tallies):
            rows.append(LayerRow(layer_idx(module), name, None, "not called yet"))
    return rows
