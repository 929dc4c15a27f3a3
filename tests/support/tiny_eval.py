"""A tiny random model with a tiny tokenizer, and a text for them; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from thrift_lab.models import Loaded, load_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LIMIT = 512
TEXT = "".join(f"The {n}th house on the hill has {n * n} windows and {n + 3} doors.\n" for n in range(400))


def make_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `TEXT`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special)


def make_model() -> LlamaForCausalLM:
    """Two layers, two query heads, one KV head of 16 dims; weights large enough for attention to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=LIMIT,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def save_model(folder: Path) -> Path:
    """Model and tokenizer as a folder that `from_pretrained` reads."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Loaded:
    """The saved model, through the loader under test."""
    return load_model(str(folder), device="cpu")
