"""A transformers model with a 4-bit KV cache: two lines more than without.

python examples/five_lines.py HuggingFaceTB/SmolLM2-135M-Instruct "What is the capital of France?"
"""

from __future__ import annotations

import sys

from thrift_attn.transformers import ThriftCache, enable
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(name: str, question: str, max_new_tokens: int = 100) -> str:
    """Answer a question: through the chat template if the model has one, else go on with the text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="auto"), AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template is None:
        inputs = tokenizer(question, return_tensors="pt")
    else:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = inputs["input_ids"].shape[1]
    enable(model)  # one
    cache = ThriftCache(model.config, max_tokens=start + max_new_tokens)  # two
    # past_key_values= before transformers 5.24
    tokens = model.generate(**inputs, cache=cache, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, start:], skip_special_tokens=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: five_lines.py MODEL QUESTION")
    print(f"{sys.argv[2]}\n{main(sys.argv[1], sys.argv[2])}")
