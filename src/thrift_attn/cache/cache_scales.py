"""Powers of two that a cache multiplies K, V and queries by: taken once, gone from everything that leaves the cache.

All that a cache holds is K s and V g, s by channel and g by KV head (`thrift_attn.reference.channel_scales`).
Queries come in as q / s and
outputs leave divided by g, so that logits and outputs are those of K and V. s and g are those of the first tokens that are
appended, and shared by all sequences, so that sequences can share pages. Steps of a captured graph take none: where the
first tokens come in one, s and g stay 1. Products are exact but for numbers that leave the range of float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thrift_attn.reference.channel_scales import Squares, level_keys, level_values, mean_squares

_HALF = 14.0  # powers that float16 holds, and their inverses


@dataclass
class CacheLevels:
    """s, g and their inverses in the dtype of the cache.

    Args:
        keys: s ``[Hkv, 1, D]``.
        values: g ``[Hkv, 1, 1]``.
        of_queries: 1 / s ``[Hkv, 1, 1, D]``.
        of_outputs: 1 / g ``[Hkv, 1, 1, 1]``.
        taken: whether they are fixed.
    """

    keys: Tensor
    values: Tensor
    of_queries: Tensor
    of_outputs: Tensor
    taken: bool = False

    @classmethod
    def ones(cls, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> CacheLevels:
        """Levels that change nothing."""

        def ones(*shape: int) -> Tensor:
            return torch.ones(kv_heads, *shape, dtype=dtype, device=device)

        return cls(ones(1, head_dim), ones(1, 1), ones(1, 1, head_dim), ones(1, 1, 1))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.keys, self.values, self.of_queries, self.of_outputs

    def take(self, k: Tensor, v: Tensor, lengths: list[int], centred: bool) -> None:
        """Fix them, unless they are, from the first tokens of a cache.

        Args:
            k: ``[B, Hkv, T, D]``.
            v: likewise.
            lengths: tokens of each sequence.
            centred: whether pages hold K less its block means.
        """
        if self.taken or not any(lengths):
            return
        self.taken = True
        if k.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if all(n == k.shape[2] for n in lengths):
            found = mean_squares(k, v, centred)
        else:
            rows = [(k[row, :, :n], v[row, :, :n]) for row, n in enumerate(lengths) if n]
            every = [mean_squares(*row, centred) for row in rows]
            found = Squares(*(torch.stack(parts) for parts in zip(*every, strict=True)))
        mean = Squares(*(part.mean(0) for part in found))
        self.set(level_keys(mean), level_values(mean))

    def set(self, keys: Tensor, values: Tensor) -> None:
        """Fix them: powers of two ``[Hkv, D]`` and ``[Hkv]``."""
        self.taken = True
        if self.keys.dtype == torch.float16:
            keys, values = (x.clamp(2**-_HALF, 2**_HALF) for x in (keys, values))
        self.keys.copy_(keys[:, None])
        self.values.copy_(values[:, None, None])
        self.of_queries.copy_(1 / keys[:, None, None])
        self.of_outputs.copy_(1 / values[:, None, None, None])

    def queries(self, q: Tensor) -> Tensor:
        """q / s of ``[B, Hq, Tq, D]``."""
        heads = len(self.of_queries)
        return (q.unflatten(1, (heads, -1)) * self.of_queries).flatten(1, 2)

    def outputs(self, out: Tensor) -> Tensor:
        """out / g of ``[B, Hq, Tq, D]``, in place."""
        out.unflatten(1, (len(self.of_outputs), -1)).mul_(self.of_outputs)
        return out
