"""A tokenizer of single characters."""

from __future__ import annotations

from typing import Any

import torch

from thrift_attn import fraction
from thrift_attn.config import ThriftConfig
from transformers import BatchEncoding

EXACT = ThriftConfig.for_cache(budget=fraction(1.0), promoted_storage="16bit")


class Letters:
    """One token per character, 0 ends."""

    chat_template = None
    bos_token_id = None
    eos_token_id = 0

    def __call__(self, text: str, return_tensors: str | None = None, **_: Any) -> Any:
        ids = [ord(c) - 32 if 32 <= ord(c) < 128 else 0 for c in text]
        return BatchEncoding({"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(int(i) + 32) for i in ids)
