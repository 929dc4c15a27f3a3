"""Several questions at a time: a batch of unequal lengths, padded on the left, in one 4-bit cache.

    python examples/batch.py HuggingFaceTB/SmolLM2-135M-Instruct "What is the capital of France?" "What is 2 plus 2?"

Pages hold tokens only: padding costs no memory of the cache.
"""

from __future__ import annotations

import argparse
from typing import Any

from thrift_attn.transformers import ThriftCache, enable


def answers(model: Any, tokenizer: Any, questions: list[str], most: int = 100) -> tuple[list[str], ThriftCache]:
    """Answers to all questions, and the cache that holds them.

    Args:
        model: after `enable`.
        tokenizer: with a padding token.
        questions: of any length.
        most: new tokens.
    """
    texts = questions
    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": question}] for question in questions]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device)
    start = inputs.input_ids.shape[1]
    cache = ThriftCache(model.config, max_tokens=start + most)
    tokens = model.generate(
        **inputs, cache=cache, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )  # past_key_values= before transformers 5.24
    return tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True), cache


def main() -> None:
    """Command line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("questions", nargs="+")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    enable(model)
    found, _ = answers(model, tokenizer, options.questions)
    for question, answer in zip(options.questions, found, strict=True):
        print(f"{question}\n{answer}\n")


if __name__ == "__main__":
    main()
