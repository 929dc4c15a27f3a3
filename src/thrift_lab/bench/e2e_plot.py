"""Pictures of an e2e record. Drawn from records only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thrift_lab.bench.e2e_records import ModelCase, ModelRecord, Side
from thrift_lab.records import OLDER, before_today
from thrift_lab.style import COLOURS, SMALL, canvas, legend, save

WORDS: dict[Side, str] = {
    "transformers": "SDPA, static cache (transformers)",
    "bf16": "BF16, cuDNN over the static cache",
    "thrift": "thrift",
    "residuals": "thrift, residuals of a share",
}


def cases(record: ModelRecord) -> list[ModelCase]:
    """Cases in order."""
    return list(dict.fromkeys(row.case for row in record.rows))


def draw(record: ModelRecord, path: Path) -> Path:
    """Draw milliseconds per token, seconds of prefill and bytes of the cache, side by side.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure, axes = canvas(11, 3.6, columns=3)
    wanted: list[tuple[str, Any]] = [
        ("decode, ms per token", lambda row: row.p50_ms),
        ("prompt, s", lambda row: row.prefill_s),
        ("KV cache, GiB", lambda row: row.kv_bytes / 2**30 if row.side != "transformers" else None),
    ]
    for axis, (title, value) in zip(axes, wanted, strict=True):
        _bars(axis, record, value)
        axis.set_title(title, loc="left")
    legend(
        figure,
        *axes[0].get_legend_handles_labels(),
        frameon=False,
        loc="outside lower center",
        ncols=3,
    )
    machine = record.context["machine"]
    old = f"\n{OLDER}" if before_today(record.context["created"]) else ""
    figure.suptitle(f"{record.model}, {machine['gpu'] or machine['cpu']}, random weights{old}", fontsize=11)
    return save(figure, path)


def _bars(axis: Any, record: ModelRecord, value: Any) -> None:
    """A group of bars for every case that has the value, one for each side; transformers' own is cut where it dwarfs them."""
    shown: list[tuple[ModelCase, list[tuple[Side, float]]]] = [
        (case, [(side, x) for side in WORDS if (row := record.row(case, side)) and (x := value(row)) is not None])
        for case in cases(record)
    ]
    shown = [(case, bars) for case, bars in shown if bars]
    top = 1.2 * max((x for _, bars in shown for side, x in bars if side != "transformers"), default=float("inf"))
    for at, (_, bars) in enumerate(shown):
        for place, (side, x) in enumerate(bars):
            where = at + (place - (len(bars) - 1) / 2) * 0.28
            first = at == 0 or all(side not in dict(other) for _, other in shown[:at])
            axis.bar(where, min(x, top), 0.26, color=COLOURS[side], label=WORDS[side] if first else None)
            words = f"{x:.3g}" if x <= top else f"{x:.3g}, cut"
            axis.text(where, min(x, top), words, ha="center", va="bottom", fontsize=SMALL)
    axis.set_xticks(range(len(shown)), [case.name for case, _ in shown], fontsize=8)
    axis.margins(y=0.18)
