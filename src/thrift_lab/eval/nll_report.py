"""Results for people: a table and a plain sentence."""

from __future__ import annotations

from rich.table import Table

from thrift_lab.eval.methods import ignored_options, looks_ahead
from thrift_lab.eval.run_nll import NLLRecord, NLLRow, is_fp4


def table(result: NLLRecord) -> Table:
    """The rows of a run as a rich table."""
    context = result.context
    size = context["bootstrap"]["block"]
    drawn = Table(
        title=f"{context['model']['spec']} on {context['text']['spec']}: {context['windows']} x {context['length']:,} tokens",
        caption=f"{context['model']['dtype']} on {context['device']}; NLL in nats per token; blocks: share of them in high "
        f"precision, mass: their share of the softmax; paired bootstrap over blocks of {size} tokens",
        title_style="bold",
        caption_style="dim",
        box=None,
        padding=(0, 1),
        header_style="bold",
    )
    drawn.add_column("method", overflow="fold", vertical="bottom", min_width=16)
    for header in ("NLL", "vs fp16", "recovered\n[95% interval]", "blocks", "mass", "seconds"):
        drawn.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    for row in result.rows:
        drawn.add_row(
            row.method.name,
            f"{row.nll:.4f}",
            _or_dash(row.loss, "{:+.4f}"),
            _recovered(row),
            _or_dash(row.spent.share if row.spent else None, "{:.1%}"),
            _or_dash(row.spent.high_mass if row.spent else None, "{:.1%}"),
            f"{row.seconds:.1f}",
        )
    return drawn


def markdown(result: NLLRecord) -> str:
    """The rows of a run as a Markdown table."""
    lines = ["| method | NLL | vs fp16 | recovered [95% interval] | blocks | mass |", "|---|---|---|---|---|---|"]
    for row in result.rows:
        cells = (
            f"`{row.method.name}`",
            f"{row.nll:.4f}",
            _or_dash(row.loss, "{:+.4f}"),
            " ".join(_recovered(row).split()),
            _or_dash(row.spent.share if row.spent else None, "{:.1%}"),
            _or_dash(row.spent.high_mass if row.spent else None, "{:.1%}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _recovered(row: NLLRow) -> str:
    if is_fp4(row.method) and row.loss is not None:
        return "0%" + " " * 11  # by definition
    if row.recovered is None:
        return "-"
    sure = row.recovered_interval
    return f"{row.recovered:.1%} " + (f"[{sure[0] * 100:3.0f}, {sure[1] * 100:3.0f}]" if sure else "")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def notes(result: NLLRecord) -> list[str]:
    """What the reader of the table has to know besides."""
    found: list[str] = []
    gap = next((row for row in result.rows if is_fp4(row.method)), None)
    if gap is None or gap.loss is None:
        found.append("No recovered share: it needs both fp16 and fp4 among the methods.")
    elif len(result.rows) > 2 and all(row.recovered is None for row in result.rows):
        found.append("No recovered share: on this text fp4 is not worse than fp16 at the 95% level. Use more tokens.")
    ahead: dict[tuple[str, ...], list[str]] = {}
    for row in result.rows:
        if reasons := tuple(looks_ahead(row.method)):
            ahead.setdefault(reasons, []).append(row.method.name)
    for reasons, names in ahead.items():
        found.append(
            f"{', '.join(names)}: the 4-bit noise of a token looks ahead to later tokens of its window ({', '.join(reasons)}). "
            "Masked logits never enter; `thrift eval decode` measures what a growing cache loses."
        )
    for row in result.rows:
        if asked := [name for name in ignored_options(row.method) if f"{name}=" in row.method.name]:
            found.append(f"{row.method.name}: {', '.join(asked)} has no effect on a text read in one go.")
        for first in row.unserved[:1]:
            more = f" and {len(row.unserved) - 1} more layers" if len(row.unserved) > 1 else ""
            found.append(f"{row.method.name} leaves layers to the model's own attention: {first}{more}.")
    return found


def sentence(result: NLLRecord) -> str:
    """What the run says, in plain words."""
    gap = next((row for row in result.rows if is_fp4(row.method)), None)
    if gap is None or gap.loss is None:
        return "Run fp16 and fp4 as well to see how much of the loss each method brings back."
    lost = f"On this text 4-bit attention costs the model {gap.loss:.3f} nats per token"
    named = [row for row in result.rows if row.recovered is not None and ":" not in row.method.name]
    if not named:
        return lost + "."
    return f"{lost}; of that, " + ", and ".join(map(_brings_back, named)) + "."


def _brings_back(row: NLLRow) -> str:
    assert row.recovered is not None
    sure = ""
    if row.recovered_interval:
        low, high = row.recovered_interval
        sure = f" (95% interval {low * 100:.0f} to {high * 100:.0f}%)"
    if row.method.config is not None and row.method.config.base_format == "drop":
        how = "dropping the rest"
    else:
        how = "in high precision"
    kept = f" with {row.spent.share:.1%} of the blocks {how}" if row.spent else ""
    return f"{row.method.name} brings back {row.recovered:.0%}{sure}{kept}"
