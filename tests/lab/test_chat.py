"""The parts of ``thrift generate`` that need no download."""

from __future__ import annotations

import pytest
import torch

from support.letters import EXACT, Letters
from support.tiny_models import build

pytest.importorskip("transformers", minversion="5.0")
from thrift_lab import chat
from thrift_lab.eval.models import Loaded


def test_answer_streams_what_generate_gives_and_counts() -> None:
    model = build("llama", eos_token_id=0)
    prompt = "a long prompt, " * 9
    want = model.generate(chat.prompt_ids(Loaded("tiny", model, Letters()), prompt, raw=False), max_new_tokens=20)
    loaded = Loaded("tiny", build("llama", eos_token_id=0), Letters())
    ids, cost = chat.prompt_ids(loaded, prompt, raw=False), chat.Cost()
    pick = chat.sampler(0, 1.0)
    pieces = list(chat.answer(loaded, ids, cost, config=EXACT, max_new_tokens=20, pick=pick, chunk=50))
    new = [token for token in want[0, len(prompt) :].tolist() if token]
    assert "".join(pieces) == Letters().decode(new)
    assert cost.prompt == 135
    assert cost.new == want.shape[1] - 135
    assert cost.promoted == 1.0
    assert cost.plain_bytes == 2 * 2 * 2 * 16 * 4
    assert cost.prefill_s > 0
    assert "135 tokens of prompt" in cost.lines()[0]


def test_sampler_draws_from_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9, -9.0]]).repeat(200, 1)
    torch.manual_seed(0)
    assert set(chat.sampler(1.0, 0.9)(logits).tolist()) == {1, 2}
    assert set(chat.sampler(1.0, 0.1)(logits).tolist()) == {1}
    assert set(chat.sampler(0, 1.0)(logits).tolist()) == {1}
    for bad in ((-1.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="temperature"):
            chat.sampler(*bad)


def test_prompts_are_checked() -> None:
    loaded = Loaded("tiny", build("llama"), Letters())
    with pytest.raises(ValueError, match="empty"):
        chat.prompt_ids(loaded, " ", raw=True)
    ids = chat.prompt_ids(loaded, "x", raw=True)
    with pytest.raises(ValueError, match="max_new_tokens"):
        next(chat.answer(loaded, ids, chat.Cost(), config=EXACT, max_new_tokens=0, pick=chat.sampler(0, 1.0)))
