"""Operations of a `thrift_lab.fuzz.machine.Machine`, drawn at random as plain values."""

from __future__ import annotations

import random
from typing import Any

from thrift_lab.fuzz.settings import TOKEN_KINDS

Operation = tuple[str, dict[str, Any]]

WEIGHTS = {
    "append": 26,
    "attend": 20,
    "truncate": 13,
    "fork": 6,
    "free": 4,
    "select": 6,
    "branch": 5,
    "drop": 3,
    "reload": 5,
    "reserve": 5,
    "refuse": 5,
    "together": 3,
}
"""How often each operation is drawn; interrupted ones are asked for apart."""

CHANGES = ("append", "append", "append", "truncate", "fork", "free", "select", "reserve", "branch", "reload")
"""What is interrupted."""


def draw_operation(rng: random.Random) -> Operation:
    """Draw an operation."""
    name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    return name, draw_arguments(rng, name)


def draw_interrupted(rng: random.Random) -> Operation:
    """Draw a change that is interrupted."""
    name = rng.choice(CHANGES)
    return "interrupted", {"name": name, "arguments": draw_arguments(rng, name), "at": rng.random()}


def _count(rng: random.Random) -> int:
    """A number of new tokens: small ones, those about a block, some long ones."""
    return rng.choice(
        (0, 1, 1, rng.randint(1, 16), rng.randint(1, 70), rng.choice((63, 64, 65, 128, 192)), rng.randint(1, 200))
    )


def draw_arguments(rng: random.Random, name: str) -> dict[str, Any]:
    """Draw the arguments of an operation."""
    which, seq, seed = rng.choice((0, 0, 1, 2, 5)), rng.choice((0, 0, 1, 2, 11)), rng.randrange(2**31)
    if name == "append":
        count = _count(rng)
        lengths = [count] if rng.random() < 0.4 else [_count(rng) for _ in range(3)]
        if rng.random() < 0.05:
            lengths = [rng.randint(200, 400)]
        kind = rng.choices(TOKEN_KINDS, (60, 20, 8, 5, 3, 2))[0]
        return {"which": which, "lengths": lengths, "seed": seed, "kind": kind, "asked": rng.random() < 0.5}
    if name == "attend":
        options = {
            "scale": rng.choice((None, None, 0.02, 0.3)),
            "window": rng.choice((None, None, rng.randint(1, 300))),
            "softcap": rng.choice((None, None, 20.0, 2.0)),
        }
        return {"which": which, "count": rng.choice((1, 1, rng.randint(1, 16))), "seed": seed, "options": options}
    if name == "truncate":
        back = rng.choice((rng.randint(0, 16), rng.randint(0, 64), rng.randint(64, 130), rng.randint(0, 600)))
        return {"which": which, "seq": seq, "back": back}
    if name == "fork":
        return {"which": which, "source": seq, "target": rng.randrange(12)}
    if name == "select":
        seqs = [rng.randrange(12) for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))]
        return {"which": which, "seqs": seqs}
    if name == "together":
        first, second = (rng.choice(("append", "append", "truncate", "free", "fork", "select")) for _ in range(2))
        drawn = [(one, draw_arguments(rng, one)) for one in (first, second)]
        return {"first": drawn[0], "second": drawn[1], "reads": seed}
    if name == "reload":
        return {"which": which, "more_pages": rng.choice((0, 1, 8))}
    if name == "reserve":
        return {"which": which, "tokens": _count(rng)}
    if name == "refuse":
        return {"which": which, "kind": seed, "seq": seq}
    return {"which": which} | ({"seq": seq} if name == "free" else {})
