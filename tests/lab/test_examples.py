"""The examples run: with a tiny random model they say what it says without them, with a real one they answer rightly."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from support.small_model import small_model
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


# -- a real model -----------------------------------------------------------------------------------------------------

TOWN = (
    "The library opens at nine and closes at six. Members may borrow up to ten books for three weeks. "
    "The lighthouse keeper's name is Alma Brandt. The ferry to the island leaves from the old harbour. "
    "The colour of the ferry is green. "
)
ASKED = {"What is the lighthouse keeper's name?": "Alma Brandt", "When does the library open?": "nine"}


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct after `enable`, and its tokenizer."""
    folder = small_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    thrift.enable(model)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_five_lines_answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["five_lines.py", str(small_model()), "What is the capital of France?"])
    runpy.run_path(str(EXAMPLES / "five_lines.py"), run_name="__main__")
    assert capsys.readouterr().out == "What is the capital of France?\nThe capital of France is Paris.\n"


@torch.no_grad()
def test_a_saved_document_is_asked(real: tuple[Any, Any], tmp_path: Path) -> None:
    module, (model, tokenizer), file = example("long_document"), real, tmp_path / "doc.safetensors"
    before, after = module["around"](tokenizer, TOWN)
    document = tokenizer(before, add_special_tokens=False, return_tensors="pt").input_ids
    module["read"](model, document, file, room=64, chunk=64)
    cache = module["read"](model, document, file, room=64)  # from the file
    for question, answer in ASKED.items():
        assert answer in module["ask"](model, tokenizer, cache, document, question + after, 12)


@torch.no_grad()
def test_questions_over_a_prefix_are_answered(real: tuple[Any, Any]) -> None:
    found, cache = example("shared_prefix")["answers"](*real, TOWN, list(ASKED), 12)
    for answer, right in zip(found, ASKED.values(), strict=True):
        assert right in answer
    assert cache.batch_size == 2


@torch.no_grad()
def test_a_batch_is_answered(real: tuple[Any, Any]) -> None:
    questions = {
        "What is the capital of France?": "Paris",
        "Hi! Please tell me: what colour is the sky by day?": "blue",
    }
    found, cache = example("batch")["answers"](*real, list(questions), 10)
    for answer, right in zip(found, questions.values(), strict=True):
        assert right in answer.lower() or right in answer
    assert cache.tokens(0) < cache.tokens(1)  # padding is not kept


def test_a_new_format_is_better(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from thrift_attn import config, numerics
    from thrift_attn.reference.formats import FORMATS

    monkeypatch.setitem(config._CHOICES, "base_format", config._CHOICES["base_format"])
    monkeypatch.setattr(numerics, "FOUR_BITS", numerics.FOUR_BITS)
    try:
        runpy.run_path(str(EXAMPLES / "new_format.py"), run_name="__main__")
    finally:
        FORMATS.pop("e2m1-by-8", None)
    errors = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert errors[0] > errors[1] > errors[2] > 0
