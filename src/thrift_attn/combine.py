"""Log-sum-exp merge of partial attention results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys into attention over their union; the order does not matter.

    Args:
        outs: partial outputs ``[..., D]``, each normalised over its own keys; zeros where it saw none.
        lses: their log-sum-exps ``[...]``, natural logarithm, -inf where a part saw no key.

    Returns:
        The output ``[..., D]`` in the dtype of the parts and the LSE ``[...]``.

    Raises:
        ValueError: no parts, or a different number of outputs and LSEs.

    Source: online softmax, arXiv 1805.02867; split attention, FlashDecoding.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"expected as many outputs as LSEs and at least one, got {len(outs)} and {len(lses)}")
    parts = torch.stack(list(lses))
    lse = parts.logsumexp(0)
    weights = (parts - torch.where(lse == -torch.inf, 0, lse)).exp()  # [parts, ...], 0 for a part without keys
    work = torch.promote_types(outs[0].dtype, weights.dtype)
    total = torch.zeros_like(outs[0], dtype=work)
    for out, weight in zip(outs, weights, strict=True):
        total += weight[..., None] * out.to(work)
    return total.to(outs[0].dtype), lse
