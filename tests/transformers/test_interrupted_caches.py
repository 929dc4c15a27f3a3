"""A `ThriftCache` after an interrupt at any line: it goes on from before or after the change, or says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.thrift_caches import cache_for, enabled
from support.tiny_models import padded, tokens
from thrift_attn import transformers as thrift_transformers
from thrift_attn.transformers.state_layers import StateSteps
from thrift_lab.fuzz.interrupts import Interrupter
from transformers import cache_utils

INTERRUPTER = Interrupter(str(Path(thrift_transformers.__file__).parent))
LENGTHS = [70, 44]


class Situation:
    """A model, a cache of two rows of unequal length behind padding, and what the next token gives."""

    def __init__(self) -> None:
        self.model = enabled()[1]
        self.ids, self.mask, positions = padded(LENGTHS, "left")
        self.first = cache_for(self.model, pool_tokens=64 * 64)
        self.model(self.ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.first)

    def step(self, cache: Any, rows: list[int], count: int = 1) -> Tensor:
        """Logits of new tokens for rows of the prompts that the cache now holds."""
        held = cache.get_seq_length()
        mask = torch.ones(len(rows), held + count, dtype=torch.long)
        mask[:, : min(held, self.mask.shape[1])] = self.mask[rows, :held]
        at = mask[:, :held].sum(1, keepdim=True) + torch.arange(count)
        new = tokens(len(LENGTHS), count, seed=5)[rows]
        return self.model(new, attention_mask=mask, position_ids=at, past_key_values=cache).logits


CHANGES: dict[str, tuple[Callable[[Situation, Any], Any], list[int]]] = {
    "a step": (lambda s, cache: s.step(cache, [0, 1]), [0, 1]),
    "more tokens": (lambda s, cache: s.step(cache, [0, 1], 20), [0, 1]),
    "crop": (lambda s, cache: cache.crop(-30), [0, 1]),
    "reorder": (lambda s, cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeat": (lambda s, cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "reserve": (lambda s, cache: cache.reserve(100), [0, 1]),
    "fork": (lambda s, cache: cache.fork(), [0, 1]),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_an_interrupt_at_any_line(name: str) -> None:
    s = Situation()
    change, rows = CHANGES[name]
    before = LENGTHS if name == "reorder" else [-1, -1]
    cache = s.first.fork()
    wanted = {(cache.get_seq_length(), 2): [s.step(cache, [0, 1])]}
    cache = s.first.fork()
    count = INTERRUPTER.run(lambda: change(s, cache))[1]
    wanted.setdefault((cache.get_seq_length(), len(rows)), []).append(s.step(cache, rows))
    refused = 0
    for line in range(1, count + 1, 3 if name == "more tokens" else 1):
        cache = s.first.fork()
        with pytest.raises(KeyboardInterrupt):
            INTERRUPTER.run(lambda: change(s, cache), line)  # noqa: B023 (called at once)
        if not cache.is_intact:
            refused += 1
            with pytest.raises(RuntimeError, match="interrupted"):
                s.step(cache, rows)
            cache.reset()
            assert cache.is_intact
            assert cache.get_seq_length() == 0
            continue
        held, batch = cache.get_seq_length(), cache.paged_layers[0].batch_size
        order = rows if batch != 2 or cache.tokens(0) == before[rows[0]] else [0, 1]
        found = s.step(cache, order)
        assert any(torch.allclose(found, x, atol=1e-5) for x in wanted[held, batch]), (line, held, order)
    assert refused < count
    assert (refused > 0) == (name not in ("reserve", "fork"))


@torch.no_grad()
def test_an_interrupted_replay_is_noticed() -> None:
    """The device may have moved on by a token that the host does not count."""
    s = Situation()

    def replay(cache: Any, *, interrupt: bool) -> None:
        with cache.replaying(1):
            if interrupt:
                raise KeyboardInterrupt

    cache = s.first.fork()
    with pytest.raises(KeyboardInterrupt):
        replay(cache, interrupt=True)
    assert not cache.is_intact
    for use in (
        cache.get_seq_length,
        lambda: cache.reserve(1),
        cache.fork,
        lambda: cache.tokens(0),
        lambda: cache.crop(-1),
    ):
        with pytest.raises(RuntimeError, match="interrupted halfway"):
            use()
    cache = s.first.fork()
    replay(cache, interrupt=False)
    assert cache.is_intact
    assert cache.get_seq_length() == 71
    count = INTERRUPTER.run(lambda: s.first.fork().advance(1))[1]
    refused = 0
    for line in range(1, count + 1):
        cache = s.first.fork()
        with pytest.raises(KeyboardInterrupt):
            INTERRUPTER.run(lambda: [cache.advance(1), s.first.fork()], line)  # noqa: B023 (called at once)
        refused += not cache.is_intact
        if cache.is_intact:
            assert len({(layer.slots, *map(layer.tokens, range(2))) for layer in cache.paged_layers}) == 1
    assert refused > 0


@torch.no_grad()
def test_an_interrupted_load_leaves_an_empty_cache(tmp_path: Path) -> None:
    s, path = Situation(), tmp_path / "cache.safetensors"
    want = s.step(s.first.fork(), [0, 1])
    s.first.save(path)
    cache = cache_for(s.model)
    count = INTERRUPTER.run(lambda: cache.load(path))[1]
    for line in range(1, count + 1):
        cache = cache_for(s.model)
        with pytest.raises(KeyboardInterrupt):
            INTERRUPTER.run(lambda: cache.load(path), line)  # noqa: B023 (called at once)
        assert cache.is_intact
        if cache.get_seq_length():
            assert torch.allclose(s.step(cache, [0, 1]), want, atol=1e-5)
        elif line % 8 == 0:
            assert torch.allclose(s.step(cache.load(path), [0, 1]), want, atol=1e-5)


@torch.no_grad()
def test_wrong_arguments_leave_the_cache_intact() -> None:
    s = Situation()
    cache = s.first.fork()
    for call in (
        lambda: cache.reorder_cache(torch.tensor([0, 5])),
        lambda: cache.advance(-1),
        lambda: cache.advance(65),
        lambda: cache.paged_layers[0].select([2]),
    ):
        with pytest.raises(ValueError, match=r"seq must be|a step appends"):
            call()
        assert cache.is_intact
    assert s.step(cache, [0, 1]).isfinite().all()


def test_an_interrupted_change_of_a_state_is_noticed_in_the_last_layer_too() -> None:
    """There all layers have done the same steps: only the end of the step tells."""
    made = getattr(cache_utils, "LinearAttentionLayer", None)
    if made is None:
        pytest.skip("transformers has no LinearAttentionLayer")
    layers, with_states = [made(), made()], [0, 1]
    steps = StateSteps()
    steps.begin(layers, 0, 1)
    for at in with_states[:-1]:
        with steps.change(at, "new conv"):
            pass
    last = steps.change(with_states[-1], "new conv")
    with pytest.raises(KeyboardInterrupt), last:
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="interrupted halfway"):
        steps.begin(layers, 1, 1)
    with pytest.raises(RuntimeError, match="interrupted halfway"):
        steps.copy().begin(layers, 1, 1)
    steps.clear()
    steps.begin(layers, 0, 1)
