"""One prefix, many questions at a time: the prefix is computed and stored once, every question only adds its own pages.

python examples/shared_prefix.py MODEL PREFIX.txt "Who ...?" "When ...?"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from thrift_attn.transformers import ThriftCache, enable
from thrift_attn.transformers.generate import generate, prefill


def around(tokenizer: Any, prefix: str) -> tuple[str, str]:
    """What stands before a question (the prefix included) and after it, by the model's chat template if it has one."""
    if tokenizer.chat_template is None:
        return prefix, ""
    chat = [{"role": "user", "content": f"{prefix}\n\n<question>"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, _, after = text.rpartition("<question>")
    return before, after


def answers(
    model: Any, tokenizer: Any, prefix: str, questions: list[str], most: int = 100
) -> tuple[list[str], ThriftCache]:
    """Answers to all questions in one batch, and the cache that holds them.

    Args:
        model: after `enable`.
        tokenizer: with a padding token.
        prefix: what all questions are about.
        questions: of any length.
        most: new tokens.
    """
    before, after = around(tokenizer, prefix)
    first = tokenizer(before, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    asked = tokenizer(
        [question + after for question in questions],
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    room = asked.input_ids.shape[1] + most
    start = first.shape[1]
    # Pages for one prefix and for what every question adds.
    cache = ThriftCache(model.config, max_tokens=start + room, pool_tokens=start + len(questions) * (room + 64))
    prefill(model, first, cache, chunk=8192)
    cache.batch_repeat_interleave(len(questions))
    ids = torch.cat([first.expand(len(questions), -1), asked.input_ids.to(model.device)], 1)
    mask = torch.cat([torch.ones_like(first).expand(len(questions), -1), asked.attention_mask.to(model.device)], 1)
    # past_key_values= before transformers 5.24
    tokens = model.generate(
        ids, attention_mask=mask, cache=cache, custom_generate=generate, max_new_tokens=most,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True), cache


def main() -> None:
    """Command line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prefix", type=Path)
    parser.add_argument("questions", nargs="+")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    enable(model)
    found, cache = answers(model, tokenizer, options.prefix.read_text(encoding="utf-8"), options.questions)
    for question, answer in zip(options.questions, found, strict=True):
        print(f"{question}\n{answer}\n")
    print(f"KV cache of all questions: {cache.nbytes() / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
