"""A model with its own attention (SDPA) while someone looks at what goes into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_NAME = "thrift-eval-watched"

Look = Callable[[Any, Tensor, Tensor, Tensor, "float | None"], None]
"""Called before each attention with the module, q ``[B, Hq, Tq, D]``, k and v ``[B, Hkv, Tk, D]``, and the scale if given."""


@contextmanager
def watched(model: Any, look: Look) -> Iterator[None]:
    """The model with SDPA inside the block, every call shown to ``look`` first; the attention it had before after it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    from transformers import AttentionInterface, AttentionMaskInterface

    def forward(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        look(module, query, key, value, kwargs.get("scaling"))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(_NAME, forward)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
