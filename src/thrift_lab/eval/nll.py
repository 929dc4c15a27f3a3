"""Per-token NLL of long windows of a text, in memory that does not grow with the vocabulary times the length."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thrift_attn.stats import Stats
from thrift_lab.eval.apply import applied, served
from thrift_lab.eval.methods import Method

LOGITS_AT_ONCE = 1 << 25
"""Largest number of logits held at one time (128 MiB in float32)."""

_CHARS_PER_TOKEN = 12

Layer = Callable[[], None]


@dataclass(frozen=True)
class Window:
    """What one method gave on one window.

    Args:
        nll: nats of tokens 1 to L-1 given those before them, float32 `[L - 1]`, on the CPU.
        seconds: of the forward pass through the layers, the output head left out.
        stats: what was promoted; None for the model's own attention.
        unserved: layers that the method left to the model's own attention, and why.
    """

    nll: Tensor
    seconds: float
    stats: Stats | None
    unserved: tuple[str, ...] = ()


def chars_needed(length: int, windows: int) -> int:
    """Characters of text that surely give enough tokens."""
    return _CHARS_PER_TOKEN * (length * windows + 64)


def windows_of(tokenizer: Any, text: str, length: int, windows: int) -> Tensor:
    """Window w is tokens [w * length, (w + 1) * length) of the text, tokenised without special tokens.

    A tokenizer that begins every text with a BOS token has it take the place of each window's first token, which is
    never scored.

    Args:
        tokenizer: of the model.
        text: at least ``windows * length`` tokens long.
        length: tokens of a window, at least 2.
        windows: number of windows, at least 1.

    Returns:
        Token ids, int64 `[windows, length]`.

    Raises:
        ValueError: a length or number of windows out of range, or too short a text.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, got {length}")
    if windows < 1:
        raise ValueError(f"windows must be at least 1, got {windows}")
    needed = length * windows
    head = text[: chars_needed(length, windows)]  # far into a long text nothing changes its first tokens
    ids = tokenizer(head, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < needed + 64 and len(head) < len(text):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < needed:
        raise ValueError(
            f"the text has {len(ids):,} tokens, but {windows} x {length:,} = {needed:,} are needed: "
            "give a longer text, or less of --windows or --length"
        )
    tokens = torch.tensor(ids[:needed], dtype=torch.int64).view(windows, length)
    if (bos := leading_bos(tokenizer)) is not None:
        tokens[:, 0] = bos
    return tokens


def leading_bos(tokenizer: Any) -> int | None:
    """The BOS token that the tokenizer puts in front of every text, or None."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def check_length(model: Any, length: int) -> None:
    """Raise ValueError when windows are longer than what the model was made for.

    Beyond it the NLL measures how the model extrapolates, not what attention loses.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"length {length:,} is over the {limit:,} positions that this model was made for")


def check_head(model: Any, tokens: Tensor) -> None:
    """Raise NotImplementedError unless `token_nll`'s reading of the output head matches the model's own logits."""
    ids = tokens[:1, :32].to(model.device)
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits.float()
        ours = logits_of(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    error, size = float((own - ours).abs().max()), float(own.abs().max())
    if own.shape != ours.shape or not error <= 0.02 * size:
        raise NotImplementedError(
            f"{type(model).__name__}: its logits are not its output head (with final_logit_softcapping) applied to the "
            f"last hidden state: they differ by {error:.3g}, the largest logit is {size:.3g}"
        )


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Float32 logits of some hidden states."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def token_nll(model: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
    """NLL of every token but the first, in chunks of the output head.

    Args:
        model: a causal language model.
        hidden: last hidden states `[L, width]`.
        tokens: ids int64 `[L]` on the same device.

    Returns:
        Nats, float32 `[L - 1]`, on the CPU.
    """
    rows = max(1, LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
    pairs = zip(hidden[:-1].split(rows), tokens[1:].split(rows), strict=True)
    return torch.cat([F.cross_entropy(logits_of(model, h), t, reduction="none") for h, t in pairs]).cpu()


def check_reads_text(method: Method) -> None:
    """Raise NotImplementedError for a method that needs a prompt and an answer."""
    if method.evict is not None:
        raise NotImplementedError(
            f"method {method.name!r} forgets tokens between a prompt and its answer: it has no NLL of a text read in one go"
        )
    if method.cached:
        raise NotImplementedError(
            f"method {method.name!r} reads its pages in answers: no NLL of a text read in one go (thrift eval decode has)"
        )


def layers_of(model: Any) -> list[Any]:
    """The decoder layers, for progress; empty when the model keeps them elsewhere."""
    return list(getattr(model.base_model, "layers", ()))


def run_window(model: Any, method: Method, tokens: Tensor, on_layer: Layer = lambda: None) -> Window:
    """One method on one window.

    Args:
        model: a causal language model in eval mode.
        method: what its attention computes.
        tokens: ids int64 `[L]`.
        on_layer: called after every decoder layer.

    Raises:
        ValueError: the NLL is not finite.
        NotImplementedError: the method serves none of the model's layers.
    """
    ids = tokens[None].to(model.device)
    check_reads_text(method)
    hooks = [layer.register_forward_hook(lambda *_: on_layer()) for layer in layers_of(model)]
    try:
        with torch.inference_mode(), applied(model, method):
            wait(ids)
            start = time.perf_counter()
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            wait(ids)
            seconds = time.perf_counter() - start
            stats, unserved = served(model, method)
            nll = token_nll(model, hidden, ids[0])
    finally:
        for hook in hooks:
            hook.remove()
    if not bool(torch.isfinite(nll).all()):
        raise ValueError(f"method {method.name!r} gave an NLL that is not finite")
    return Window(nll, seconds, stats, unserved)


def wait(x: Tensor) -> None:
    """Wait for the device, so that seconds are true."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
