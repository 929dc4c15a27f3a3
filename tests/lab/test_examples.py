"""The examples run, at the size of a tiny random model, and say what the model says without them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from support.tiny_models import build

transformers = pytest.importorskip("transformers", minversion="5.0")
thrift = pytest.importorskip("thrift_attn.transformers")
tokenizers = pytest.importorskip("tokenizers")

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["<pad>", "<?>", "<end>", *(f"w{i}" for i in range(3, 97))]
TEXT = " ".join(WORDS[(7 * i * i + 3 * i) % 90 + 5] for i in range(150))


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a tokenizer that knows 97 words."""
    folder = tmp_path_factory.mktemp("model")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<?>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    tokenizer.save_pretrained(folder)
    build("llama", attn="sdpa").save_pretrained(folder)
    return folder


def loaded(saved: Path) -> tuple[Any, Any]:
    return (
        transformers.AutoModelForCausalLM.from_pretrained(saved),
        transformers.AutoTokenizer.from_pretrained(saved),
    )


def plain_words(saved: Path, text: str, new: int) -> list[str]:
    model, tokenizer = loaded(saved)
    ids = tokenizer(text, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=new)[0, ids.shape[1] :]).split()


def test_five_lines(saved: Path) -> None:
    pytest.importorskip("accelerate")
    text = " ".join(WORDS[5:45])  # one incomplete block: exact
    got = example("five_lines")["main"](str(saved), text, 10)
    assert got.split() == plain_words(saved, text, 10)


@torch.no_grad()
def test_long_document_is_read_once(saved: Path, tmp_path: Path) -> None:
    module, (model, tokenizer), file = example("long_document"), loaded(saved), tmp_path / "doc.safetensors"
    thrift.enable(model)
    document = tokenizer(TEXT, return_tensors="pt").input_ids
    cache = module["read"](model, document, file, room=64, chunk=60)
    first = module["ask"](model, tokenizer, cache, document, "w7 w8 w9", 6)
    assert len(first.split()) == 6
    assert cache.get_seq_length() == 150
    again = module["read"](model, document, file, room=64)
    assert module["ask"](model, tokenizer, again, document, "w7 w8 w9", 6) == first
    assert module["ask"](model, tokenizer, again, document, "w7 w8 w9", 6) == first


@torch.no_grad()
def test_shared_prefix_is_stored_once(saved: Path) -> None:
    module, (model, tokenizer) = example("shared_prefix"), loaded(saved)
    thrift.enable(model)
    # Questions whose answers hold no special token.
    questions = ["w20", "w20 w9 w10 w11", "w12 w13"]
    found, cache = module["answers"](model, tokenizer, TEXT, questions, 6)
    assert all(len(answer.split()) == 6 for answer in found)
    assert [cache.tokens(row) for row in range(3)] == [150 + n + 5 for n in (1, 4, 2)]
    pages = [cache.paged_layers[0].paged.table.pages(row).tolist() for row in range(3)]
    assert pages[0] == pages[1] == pages[2]
    alone, _ = module["answers"](model, tokenizer, TEXT, questions[:1], 6)
    assert alone[0] == found[0]
