"""Questions about a long document: read it once in chunks, keep the cache in a file, answer with replayed steps.

    python examples/long_document.py MODEL DOCUMENT.txt "Who ...?" "When ...?" --cache document.safetensors

Started again with the same file, the document is not read a second time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from thrift_attn.transformers import ThriftCache, enable
from thrift_attn.transformers.generate import prefill, stream


def around(tokenizer: Any, document: str) -> tuple[str, str]:
    """What stands before a question (the document included) and after it, by the model's chat template if it has one."""
    if tokenizer.chat_template is None:
        return f"{document}\n\n", ""
    chat = [{"role": "user", "content": f"{document}\n\n<question>"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, _, after = text.rpartition("<question>")
    return before, after


def read(model: Any, ids: torch.Tensor, file: Path, room: int, chunk: int = 8192) -> ThriftCache:
    """The cache of a document, from the file if it is there.

    Args:
        model: after `enable`.
        ids: the document, int64 ``[1, S]``.
        file: where the cache is kept.
        room: tokens for questions and answers behind it.
        chunk: tokens at a time: more is faster, less needs less memory.
    """
    cache = ThriftCache(model.config, max_tokens=ids.shape[1] + room)
    if file.exists():
        return cache.load(file, model.device)
    prefill(model, ids, cache, chunk=chunk)
    cache.save(file)
    return cache


def ask(model: Any, tokenizer: Any, cache: ThriftCache, document: torch.Tensor, question: str, most: int = 100) -> str:
    """The answer to one question; the cache is left as it was."""
    asked = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    new = []
    for token in stream(model, torch.cat([document, asked], 1), cache, max_new_tokens=most):
        if int(token) == tokenizer.eos_token_id:
            break
        new.append(int(token))
    cache.crop(document.shape[1] - cache.get_seq_length())  # take the question back, keep the document
    return tokenizer.decode(new)


def main() -> None:
    """Command line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("document", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--cache", type=Path, default=Path("document.safetensors"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    enable(model)
    before, after = around(tokenizer, options.document.read_text(encoding="utf-8"))
    document = tokenizer(before, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    cache = read(model, document, options.cache, room=1024)
    print(f"{document.shape[1]} tokens in {cache.nbytes() / 2**20:.0f} MiB")
    for question in options.questions:
        print(f"{question}\n{ask(model, tokenizer, cache, document, question + after)}\n")


if __name__ == "__main__":
    main()
