"""The method in one picture: blocks of a causal matrix, a few of them lit, two precisions that meet in one softmax."""

from __future__ import annotations

import random

from thrift_lab.handbook.drawing import Picture, Theme

BLOCKS, CELL = 24, 12
LEFT, TOP = 14, 66
RIGHT, WIDE = 326, 262
_LABEL = (
    "A causal matrix of query and key blocks. Most blocks are 4-bit data, a few are lit and in high precision, "
    "the first token is exact. Both meet in one softmax."
)


def method_picture(theme: Theme) -> str:
    """Draw the method; a schema, not data."""
    picture = Picture(600, 452, theme, _LABEL)
    shades = picture.shades
    picture.words((LEFT, 24), "Keys, in blocks of 64 tokens", 16, bold=True)
    picture.words((LEFT, 48), "each row: 64 queries; causal", 14, shades.soft)
    lit = _lit()
    for row in range(BLOCKS):
        for column in range(row + 1):
            fill = shades.lit if (row, column) in lit else shades.low
            picture.box((LEFT + CELL * column, TOP + CELL * row), (CELL - 1.5, CELL - 1.5), fill)
    picture.box((LEFT - 6, TOP), (3, BLOCKS * CELL - 1.5), shades.lit)
    below = TOP + BLOCKS * CELL + 24
    for line, text in enumerate(
        (
            "Bar on the left: the first token, always exact.",
            "Drawn larger than life: 5% would be",
            "15 of these 300 blocks.",
        )
    ):
        picture.words((LEFT - 6, below + 20 * line), text, 14, shades.soft)

    budget = (
        "A budget of blocks, 5%",
        "in 16 bits, or the 4-bit data",
        "and what they left over; chosen",
        "by mean query x mean key",
    )
    others = (
        "All other blocks",
        "4-bit numbers, scale per 16;",
        "K less the mean of its block,",
        "which stays in 16 bits",
    )
    _path(picture, 20, shades.lit, budget)
    _path(picture, 166, shades.low, others)
    picture.arrow((LEFT + CELL * 6.5, TOP + CELL * 3), (RIGHT - 4, 76), shades.lit)
    picture.arrow((LEFT + CELL * 18.5, TOP + CELL * 15), (RIGHT - 4, 222), shades.soft)
    picture.box((RIGHT, 338), (WIDE, 98), shades.pale, shades.rule, 8)
    picture.words((RIGHT + WIDE / 2, 368), "One softmax over all", 16, anchor="middle", bold=True)
    picture.words((RIGHT + WIDE / 2, 394), "no pair is dropped,", 14, shades.soft, "middle")
    picture.words((RIGHT + WIDE / 2, 414), "nothing is trained", 14, shades.soft, "middle")
    picture.drop((RIGHT + WIDE - 12, 132), 334, shades.lit)
    picture.drop((RIGHT + WIDE / 2, 278), 334, shades.soft)
    return picture.svg()


def _path(picture: Picture, top: float, colour: str, lines: tuple[str, ...]) -> None:
    """A frame with a bar of its colour, a heading and some lines."""
    shades = picture.shades
    picture.box((RIGHT, top), (WIDE, 112), shades.pale, shades.rule, 8)
    picture.box((RIGHT, top + 8), (5, 96), colour)
    picture.words((RIGHT + 18, top + 30), lines[0], 16, bold=True)
    for line, text in enumerate(lines[1:]):
        picture.words((RIGHT + 18, top + 55 + 20 * line), text, 14, shades.soft)


def _lit() -> set[tuple[int, int]]:
    """Promoted blocks of the schema: the newest block of each row, and some that several rows look back at."""
    draw = random.Random(2)
    loved = [3, 8, 9, 15]
    lit = {(row, row) for row in range(BLOCKS)}
    for row in range(4, BLOCKS):
        seen = [column for column in loved if column < row - 1]
        if seen and draw.random() < 0.62:
            lit.add((row, draw.choice(seen)))
    return lit
