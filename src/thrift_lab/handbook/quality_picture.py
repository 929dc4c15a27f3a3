"""KV bytes against loss: what methods lose on a text, what a decode step reads and what has to be kept."""

from __future__ import annotations

from thrift_lab.handbook.drawing import Picture, Theme
from thrift_lab.handbook.measured import Loss, loss
from thrift_lab.records import MARK, OLDER

_TEXT = "h100/smollm2-135m-shakespeare-8192"
_RIVALS = "cpu/rivals/smollm2-135m-shakespeare-8192-kv.json"
ROWS: tuple[tuple[str, str, str, str, bool], ...] = (
    # label, colour, record, method in it, whether it speaks for our default
    ("NVFP4, every block", "fp4", f"{_TEXT}-default.json", "fp4", False),
    ("NVFP4 cache, 16-bit Q and P", "fp4", _RIVALS, "nvfp4kv", False),
    ("Quest, keeps 29%", "quest", f"{_TEXT}-forced.json", "quest:budget=0.2948", False),
    ("the paper's form, 5%", "paper", f"{_TEXT}-default.json", "paper", False),
    ("FP8 cache", "fp8", _RIVALS, "fp8kv", False),
    ("thrift, 5%", "thrift", f"{_TEXT}-default.json", "thrift:math=16bit,high=nested", True),
)
LEFT, MIDDLE, TOP, STEP = 14, 336, 92, 58


def rows() -> list[tuple[str, str, Loss]]:
    """Label, colour and figures of every row."""
    return [(label, colour, loss(record, method, ours)) for label, colour, record, method, ours in ROWS]


def quality_picture(theme: Theme) -> str:
    """Draw bars of loss on the left and of bytes on the right."""
    found = rows()
    picture = Picture(
        600, TOP + STEP * len(found) + (62 if any(one.older for *_, one in found) else 42), theme, _label(found)
    )
    shades = picture.shades
    picture.words((LEFT, 26), "What attention loses, and what its KV cache costs", 17, bold=True)
    picture.words((LEFT, 56), "loss, nats per token", 14, shades.soft)
    picture.words((MIDDLE, 56), "KV bytes read | kept (16 bits: 100%)", 14, shades.soft)
    most, room = max(one.high for *_, one in found), 240
    scale, bytes_scale = room / most, 150 / max(1.3, *(one.stores for *_, one in found))
    for index, (label, colour, one) in enumerate(found):
        top = TOP + STEP * index
        fill = picture.colour(colour)
        mark = f" {MARK}" if one.older else ""
        picture.words((LEFT, top - 6), label + mark, 15, bold=colour == "thrift")
        picture.box((LEFT, top + 2), (max(1.5, one.nats * scale), 16), fill)
        end = LEFT + max(one.high, one.nats) * scale
        picture.line((LEFT + max(0.0, one.low) * scale, top + 10), (end, top + 10), shades.ink, 1.5)
        picture.words((end + 8, top + 16), f"{one.nats:+.4f}", 14)
        picture.box((MIDDLE, top + 2), (one.stores * bytes_scale, 16), "none", fill, 2)
        picture.box((MIDDLE, top + 2), (one.reads * bytes_scale, 16), fill)
        picture.words((MIDDLE + one.stores * bytes_scale + 8, top + 16), f"{one.reads:.0%} | {one.stores:.0%}", 14)
    low = TOP + STEP * len(found)
    picture.words((LEFT, low), "SmolLM2-135M, 8,192 tokens of Shakespeare's plays, 95% intervals.", 13, shades.soft)
    picture.words(
        (LEFT, low + 20), "Quest at equal cost of prefill. Filled: read by a step of decode.", 13, shades.soft
    )
    if any(one.older for *_, one in found):
        picture.words((LEFT, low + 40), f"{MARK} {OLDER}.", 13, shades.soft)
    return picture.svg()


def _label(found: list[tuple[str, str, Loss]]) -> str:
    told = (f"{label}: {one.nats:+.4f} nats, reads {one.reads:.0%}, keeps {one.stores:.0%}" for label, _, one in found)
    return "Loss per token and bytes of the KV cache. " + "; ".join(told)
