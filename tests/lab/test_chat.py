"""The parts of ``thrift generate`` that need no download."""

from __future__ import annotations

import pytest
import torch

from support.letters import EXACT, Letters
from support.tiny_models import build
from thrift_attn.config import ThriftConfig, fraction

pytest.importorskip("transformers", minversion="5.0")
from thrift_lab import chat
from thrift_lab.models import Loaded


def test_answer_streams_what_generate_gives_and_counts() -> None:
    model = build("llama", eos_token_id=0)
    prompt = "a long prompt, " * 9
    want = model.generate(chat.prompt_ids(Loaded("tiny", model, Letters()), prompt, raw=False), max_new_tokens=20)
    loaded = Loaded("tiny", build("llama", eos_token_id=0), Letters())
    ids, pieces = chat.prompt_ids(loaded, prompt, raw=False), []
    greedy = chat.sampling(0, 1.0)
    cost = chat.answer(loaded, ids, pieces.append, config=EXACT, max_new_tokens=20, chunk=50, **greedy)
    new = [token for token in want[0, len(prompt) :].tolist() if token]
    assert "".join(pieces) == Letters().decode(new)
    assert cost.prompt == 135
    assert cost.new == want.shape[1] - 135
    assert cost.promoted == 1.0
    assert cost.plain_bytes == 2 * 2 * 2 * 16 * 4
    assert cost.prefill_s > 0
    assert "135 tokens of prompt" in cost.lines()[0]


def test_what_is_reported_as_promoted_is_what_decode_promotes() -> None:
    """At 10% of two complete blocks and an incomplete one nothing is promoted: a block that is not complete costs nothing."""
    loaded = Loaded("tiny", build("llama"), Letters())
    ids = chat.prompt_ids(loaded, "a long prompt, " * 9, raw=True)
    for budget, share in ((0.1, 0.0), (0.3, 0.5)):
        config = ThriftConfig.for_cache(budget=fraction(budget))
        cost = chat.answer(loaded, ids, lambda text: None, config=config, max_new_tokens=4, **chat.sampling(0, 1.0))
        assert cost.promoted == share


def test_sampling_draws_from_the_likeliest() -> None:
    loaded = Loaded("tiny", build("llama"), Letters())
    ids = chat.prompt_ids(loaded, "a long prompt, ", raw=True)

    def said(temperature: float, top_p: float, seed: int) -> str:
        torch.manual_seed(seed)
        pieces: list[str] = []
        options = chat.sampling(temperature, top_p)
        chat.answer(loaded, ids, pieces.append, config=EXACT, max_new_tokens=8, **options)
        return "".join(pieces)

    assert said(3.0, 1.0, 0) != said(3.0, 1.0, 1)
    assert said(3.0, 1e-6, 0) == said(3.0, 1e-6, 1) == said(0, 1.0, 0)
    for bad in ((-1.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="temperature"):
            chat.sampling(*bad)


def test_prompts_are_checked() -> None:
    loaded = Loaded("tiny", build("llama"), Letters())
    with pytest.raises(ValueError, match="empty"):
        chat.prompt_ids(loaded, " ", raw=True)
    ids = chat.prompt_ids(loaded, "x", raw=True)
    with pytest.raises(ValueError, match="max_new_tokens"):
        chat.answer(loaded, ids, print, config=EXACT, max_new_tokens=0)
