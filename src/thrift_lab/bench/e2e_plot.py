"""Pictures and tables of an e2e record. Drawn from records only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from thrift_attn.config import BLOCK, Budget
from thrift_attn.reference.budget import promoted_in_decode
from thrift_lab.bench.e2e_records import ModelCase, ModelRecord, ModelRow, Side
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


def baseline(record: ModelRecord, case: ModelCase) -> ModelRow | None:
    """The fastest timed baseline of a case."""
    rows = [row for side in ("bf16", "transformers") if (row := record.row(case, side))]
    return min(rows, key=lambda row: row.p50_ms, default=None)


def promoted_share(record: ModelRecord, case: ModelCase) -> float:
    """Share of the complete KV blocks that a decode step of ours promotes when the cache is full."""
    budget = Budget.parse(record.context["settings"]["config"]["budget"])
    return promoted_in_decode(budget, case.context) / max(1, case.context // BLOCK)


def table(record: ModelRecord) -> Table:
    """All rows, and how far ahead of the fastest baseline we are."""
    machine = record.context["machine"]["gpu"] or record.context["machine"]["cpu"]
    out = Table(title=f"{record.model} on {machine}", box=None, padding=(0, 1), header_style="bold")
    out.add_column("case")
    out.add_column("side")
    for header in ("promoted", "prefill s", "first token s", "ms/token", "KV GiB", "peak GiB", "prefill", "decode"):
        out.add_column(header, justify="right")
    for row in record.rows:
        if row.status != "timed":
            out.add_row(row.case.name, row.side, "", f"[yellow]{row.status}[/yellow]", *[""] * 6)
            continue
        base = baseline(record, row.case) if row.ours else None
        plain = record.row(row.case, "bf16")
        peak = max(row.peak_prefill or 0, row.peak_decode or 0)
        out.add_row(
            row.case.name,
            row.side,
            f"{promoted_share(record, row.case):.1%}" if row.ours else "",
            "" if row.prefill_s is None else f"{row.prefill_s:.2f}",
            "" if row.first_token_s is None else f"{row.first_token_s:.2f}",
            f"{row.p50_ms:.2f}",
            f"{row.kv_bytes / 2**30:.2f}",
            f"{peak / 2**30:.1f}",
            f"{plain.prefill_s / row.prefill_s:.2f}x" if base and plain and plain.prefill_s and row.prefill_s else "",
            f"{base.p50_ms / row.p50_ms:.2f}x" if base else "",
        )
    for side, row in record.full.items():
        cells = (
            "",
            "",
            "",
            f"{row['decode_ms']:.2f}",
            f"{row['kv_bytes'] / 2**30:.2f}",
            f"{row.get('peak', 0) / 2**30:.1f}",
        )
        held = f"fullest: B{row['sequences']} x {row['context']:,}"
        out.add_row(held, side, *cells, f"{row['tokens']:,} tokens", f"{row['tokens_per_s']:,.0f}/s")
    return out


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
