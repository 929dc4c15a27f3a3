"""A transformers model with a 4-bit KV cache: two lines more than without."""

from __future__ import annotations

import sys

from thrift_attn.transformers import ThriftCache, enable
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(name: str, prompt: str, max_new_tokens: int = 100) -> str:
    """Answer a prompt."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(name, device_map="auto"),
        AutoTokenizer.from_pretrained(name),
    )
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    enable(model)
    cache = ThriftCache(model.config, max_tokens=inputs.input_ids.shape[1] + max_new_tokens)
    tokens = model.generate(**inputs, cache=cache, max_new_tokens=max_new_tokens)
    return tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: five_lines.py MODEL PROMPT")
    print(main(sys.argv[1], sys.argv[2]))
