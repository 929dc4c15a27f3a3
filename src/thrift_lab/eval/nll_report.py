"""What the result of `thrift eval nll` says, in sentences."""

from __future__ import annotations

from thrift_lab.eval.dated import in_todays_words
from thrift_lab.eval.methods import ignored_options, looks_ahead, parse_methods
from thrift_lab.eval.run_nll import NLLRecord, NLLRow, is_fp4


def only(result: NLLRecord, methods: str) -> NLLRecord:
    """Return a record with some methods alone, at any budget; ``fp16`` and ``fp4`` stay.

    Args:
        result: the record.
        methods: as in `thrift_lab.eval.methods.parse_methods`, by the names that options have today.
    """
    families = {in_todays_words(method.family) for method in parse_methods(methods)}
    kept = [
        row
        for row in result.rows
        if row.method.config is None or is_fp4(row.method) or in_todays_words(row.method.family) in families
    ]
    return result.model_copy(update={"rows": kept})


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
