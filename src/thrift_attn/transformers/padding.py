"""Padding among new tokens, and what a mask says about the tokens of a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Padding:
    """New tokens of which some are padding.

    Args:
        start: slot of the first one.
        is_token: bool ``[B, T]`` on the device.
        counts: tokens of each row.
    """

    start: int
    is_token: Tensor
    counts: list[int]

    def left(self) -> Tensor:
        """int64 ``[B, T]``: the tokens of a row in order, then its padding."""
        return self.is_token.int().argsort(dim=1, descending=True, stable=True)

    def right(self) -> Tensor:
        """int64 ``[B, T]``: the padding of a row, then its tokens in order."""
        return self.is_token.int().argsort(dim=1, stable=True)


@dataclass(frozen=True)
class Seen:
    """What a mask says about the slots of a cache.

    Args:
        shown: tokens of each row that it shows among the slots before the new ones.
        padding: the padding among the new slots; None if there is none.
    """

    shown: list[int]
    padding: Padding | None


class MaskReader:
    """Reads a mask once for all layers of a forward: they get the same tensor, and reading waits for the device."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, Seen] | None = None

    def read(self, tokens: Tensor, held: int, count: int) -> Seen:
        """Read a mask.

        Args:
            tokens: bool ``[B, held + count]``, True at tokens.
            held: slots that the cache holds.
            count: new slots.
        """
        last = self._last
        if last is None or last[0] is not tokens or last[1] != held:
            new = tokens[:, held : held + count]
            shown, counts = torch.stack([tokens[:, :held].sum(1), new.sum(1)]).tolist()
            padding = None if min(counts) == count else Padding(held, new, counts)
            last = self._last = (tokens, held, Seen(shown, padding))
        return last[2]


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of ``[B, H, T, D]`` in the order ``[B, T]``."""
    return x.gather(2, index[:, None, :, None].expand_as(x))


def spread(x: Tensor, is_token: Tensor | None) -> Tensor:
    """Tokens ``[B, H, longest, D]`` put into their slots ``[B, S]``, 0 elsewhere; None: slots are tokens."""
    if is_token is None:
        return x
    at = (is_token.int().cumsum(1) - 1).clamp(min=0)[:, None, :, None]
    x = x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3]))
    return x.masked_fill(~is_token[:, None, :, None], 0)
