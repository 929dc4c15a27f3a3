"""A tiny random model, prompts for it, and what it answers: `make test-vllm`."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from support.vllm_engine import Output, ask, engine
from thrift_lab.serving.engine_jobs import write_tiny_model

WORDS = 256

found = find_spec("vllm")
if found is None or found.origin is None:  # no vLLM, or the folder of that name beside this one
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of two layers with random weights of float16, and a tokenizer of 256 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    write_tiny_model(folder, words=WORDS)
    return str(folder)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of 5 to 300 tokens; two begin alike, and one repeats itself, so that n-grams are found."""
    import torch

    g = torch.Generator().manual_seed(1)
    drawn = [torch.randint(4, WORDS, (n,), generator=g).tolist() for n in (97, 260, 180, 5)]
    return [*drawn, drawn[1][:192] + drawn[2][:50], drawn[0][:30] * 8]


@pytest.fixture(scope="session")
def of_vllm(model: str, prompts: list[list[int]]) -> list[Output]:
    """What vLLM's own attention answers."""
    with engine(model, None) as llm:
        return ask(llm, prompts)


@pytest.fixture(scope="session")
def of_thrift(model: str, prompts: list[list[int]]) -> list[Output]:
    """What thrift answers with every block promoted, cold."""
    with engine(model, {"budget": 1}) as llm:
        return ask(llm, prompts)
