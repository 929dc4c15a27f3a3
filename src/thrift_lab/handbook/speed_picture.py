"""Decode steps of one GPU: our time beside the fastest 16-bit and the fastest FP8 kernel."""

from __future__ import annotations

from thrift_lab.handbook.drawing import Picture, Theme
from thrift_lab.handbook.measured import Timed, timed
from thrift_lab.records import MARK, OLDER

LEFT, TOP, STEP, ROOM = 14, 98, 108, 400


def cases() -> list[Timed]:
    """The newest record of each case that the picture and the table of decode show."""
    newest = {one.case: one for one in timed("h100/decode/target.json", promoted_storage="nested")}
    newest |= {one.case: one for one in timed("h100/decode/sink.json", promoted_storage="nested")}
    return list(newest.values())


def in_words(case: str) -> str:
    """``B8 128k 32/8`` as ``8 sequences of 128k tokens``."""
    batch, length, *_ = case.split()
    return f"{batch[1:]} sequence{'s' * (batch != 'B1')} of {length} tokens"


def speed_picture(theme: Theme) -> str:
    """Draw three bars a case."""
    found = cases()
    told = "; ".join(f"{in_words(one.case)}: {one.speedup.ours.p50_us:,.0f} us" for one in found)
    picture = Picture(600, TOP + STEP * len(found) + 24, theme, f"Microseconds of a decode step. thrift: {told}")
    shades = picture.shades
    picture.words((LEFT, 26), "A decode step on one H100, microseconds", 17, bold=True)
    picture.words((LEFT, 50), "one layer, 32 query and 8 KV heads of 128; times faster in brackets", 14, shades.soft)
    for index, one in enumerate(found):
        top, speedup = TOP + STEP * index, one.speedup
        bars = [("bf16", speedup.bf16), ("fp8", speedup.fp8), ("thrift", speedup.ours)]
        longest = max(row.p50_us for _, row in bars if row is not None)
        picture.words((LEFT, top - 8), in_words(one.case) + (f" {MARK}" if one.older else ""), 15, bold=True)
        for line, (kind, row) in enumerate(bars):
            if row is None:
                continue
            at = top + 25 * line
            wide = row.p50_us / longest * (ROOM - 130)
            ratio = "" if kind == "thrift" else f" ({row.p50_us / speedup.ours.p50_us:.2f}x)"
            name = "thrift, 5%" if kind == "thrift" else row.method
            picture.box((LEFT, at), (wide, 18), picture.colour(kind))
            picture.words((LEFT + wide + 8, at + 15), f"{row.p50_us:,.1f}  {name}{ratio}", 14, bold=kind == "thrift")
    if any(one.older for one in found):
        picture.words((LEFT, TOP + STEP * len(found) + 6), f"{MARK} {OLDER}.", 13, shades.soft)
    return picture.svg()
