"""The table of models in docs/models.md: what thrift attention and a `ThriftCache` do with each family of transformers.

Every family is a tiny random model (`thrift_lab.families`), computed in float32 by itself and with a budget of 1, which is
exact attention: whatever differs is a fault of the way in which the model is served.

    thrift doctor --models docs/models.md
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import transformers
from thrift_attn import ThriftConfig, fraction
from thrift_attn.transformers import ThriftCache, disable, enable, report
from thrift_attn.transformers.versions import cache_keyword
from thrift_lab.families import FAMILIES, VOCABULARY, Family
from thrift_lab.provenance import now, versions, write_files
from transformers import AutoConfig, AutoModelForCausalLM

EXACT = ThriftConfig(budget=fraction(1.0))
EXACT_CACHE = ThriftConfig(compute="16bit", promoted_storage="16bit", budget=fraction(1.0))
TOLERANCE = 1e-3
"""Largest difference of logits in units of the largest logit; wrong attention is off by 0.1 and more."""

_PROMPT = 150
_CHUNKS = (60, 1, 20, 69)
_LENGTHS = (70, 44)  # of a padded batch
_NEW_TOKENS = 5

Verdict = Literal["right", "wrong", "refused", "-"]
"""``"-"``: the model itself cannot do it."""


@dataclass(frozen=True)
class Row:
    """What a check of one family found.

    Args:
        family: its name.
        prompt: logits of a prompt at budget 1 against those of the model itself.
        causal: whether a changed last token leaves the logits before it alone.
        generation: greedy generation of a padded batch, with the cache of transformers.
        cached_generation: the same with a `ThriftCache`.
        cached_chunks: a prompt in chunks through a `ThriftCache`.
        layers: layers that thrift attends, of all layers with attention.
        cached_layers: the same with a `ThriftCache`.
        why: what stands in the way of the others.
    """

    family: str
    prompt: Verdict
    causal: Verdict
    generation: Verdict
    cached_generation: Verdict
    cached_chunks: Verdict
    layers: str
    cached_layers: str
    why: str

    def verdicts(self) -> tuple[Verdict, ...]:
        """All verdicts."""
        return self.prompt, self.causal, self.generation, self.cached_generation, self.cached_chunks

    def markdown(self) -> str:
        """The line of the table."""
        cells = (self.family, *self.verdicts(), self.layers, self.cached_layers, self.why or "")
        return "| " + " | ".join(cells) + " |"


HEADER = (
    "| family | prompt | causal | generation | ThriftCache: generation | ThriftCache: chunks | layers "
    "| layers, ThriftCache | why not all |\n|---|---|---|---|---|---|---|---|---|"
)


def build(family: Family) -> Any:
    """A tiny random model of a family in eval mode, with the attention that transformers picks; always the same weights."""
    config = AutoConfig.for_model(family.kind, **family.sizes())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, parameter in model.named_parameters():
        if "sink" in name.rsplit(".", 1)[-1]:
            nn.init.normal_(parameter)
    return model


def known(family: Family) -> bool:
    """Whether the installed transformers has a family."""
    return family.kind in transformers.CONFIG_MAPPING


def check(family: Family) -> Row:
    """Check one family.

    Args:
        family: one that the installed transformers has.

    Returns:
        Its row.
    """
    with _quiet(), torch.no_grad():
        return _check(family)


def _check(family: Family) -> Row:
    model = build(family)
    prompt = _tokens(1, _PROMPT)
    changed = torch.cat([prompt[:, :-1], (prompt[:, -1:] + 1) % VOCABULARY], 1)
    want = _logits(model, prompt)
    generated, in_chunks = _own(lambda: _generate(model)), _own(lambda: _chunked(model, transformers.DynamicCache))
    try:
        enable(model, EXACT)
        got = _logits(model, prompt)
    except NotImplementedError as error:
        if getattr(model.config, "_attn_implementation", None) == "thrift":
            disable(model)
        untouched: Verdict = "refused" if torch.equal(_logits(model, prompt), want) else "wrong"
        return Row(family.name, untouched, *["refused"] * 4, "none", "none", _sentence([str(error)]))  # type: ignore[arg-type]
    layers, why = _served(model)
    causal = _verdict(_close(got[:, :-1], _logits(model, changed)[:, :-1]))
    refusals: list[str] = []
    generation = _judge(generated, lambda: _generate(model), _same_steps, refusals)

    def cache(**_: Any) -> ThriftCache:
        return ThriftCache(model.config, 512, decode=EXACT_CACHE)

    cached_generation = _judge(generated, lambda: _generate(model, cache()), _same_steps, refusals)
    enable(model, EXACT)  # counts from zero
    chunks = _judge(in_chunks, lambda: _chunked(model, cache), _close, refusals)
    cached_layers, cached_why = _served(model)
    if "refused" in (chunks, cached_generation):
        cached_layers = "none"
    return Row(
        family.name,
        _verdict(_close(got, want)),
        causal,
        generation,
        cached_generation,
        chunks,
        layers,
        cached_layers,
        _sentence([*why, *cached_why, *refusals]),
    )


def _own(run: Callable[[], Any]) -> Any:
    """What the model itself gives; None if it cannot."""
    try:
        return run()
    except ValueError:
        return None


def _judge(want: Any, run: Callable[[], Any], same: Callable[[Any, Any], bool], refusals: list[str]) -> Verdict:
    """Compare a run with what the model itself gives."""
    if want is None:
        return "-"
    try:
        return _verdict(same(run(), want))
    except NotImplementedError as error:
        refusals.append(str(error))
        return "refused"


def _verdict(right: bool) -> Verdict:
    return "right" if right else "wrong"


def _close(got: Tensor, want: Tensor) -> bool:
    same = got.isnan() == want.isnan()  # a row that is only padding may be NaN
    difference = (got - want).nan_to_num().abs().max() / want.nan_to_num().abs().max()
    return bool(same.all()) and float(difference) < TOLERANCE


def _same_steps(got: Any, want: Any) -> bool:
    """Whether two generations agree, up to a tie in which rounding decides."""
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        if not _close(ours, theirs):
            return False
        if not torch.equal(ours.argmax(-1), theirs.argmax(-1)):
            return True
    return torch.equal(got.sequences, want.sequences)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def _chunked(model: Any, cache_type: Callable[..., Any]) -> Tensor:
    """Logits of a prompt in chunks; the cache is kept between them."""
    cache = cache_type(config=model.config)
    options = {cache_keyword(model): cache, "use_cache": True}
    parts = _tokens(2, _PROMPT).split(list(_CHUNKS), dim=1)
    return torch.cat([model(part, **options).logits for part in parts], 1)


def _generate(model: Any, cache: Any = None) -> Any:
    """Greedy tokens and logits for a batch with padding on the left."""
    ids, mask = _tokens(len(_LENGTHS), max(_LENGTHS)), torch.ones(len(_LENGTHS), max(_LENGTHS), dtype=torch.long)
    for row, length in enumerate(_LENGTHS):
        mask[row, : max(_LENGTHS) - length] = 0
    options = {} if cache is None else {cache_keyword(model): cache}
    return model.generate(
        ids.where(mask.bool(), 0),
        attention_mask=mask,
        max_new_tokens=_NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def _served(model: Any) -> tuple[str, list[str]]:
    """Layers served by thrift, of all that have attention, and the reasons of the others."""
    rows = [row for row in report(model) if row.served_by is not None]
    ours = {row.name for row in rows if row.served_by == "thrift"} - {
        row.name for row in rows if row.served_by != "thrift"
    }
    return f"{len(ours)} of {len({row.name for row in rows})}", [row.reason for row in rows if row.name not in ours]


def _sentence(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reason.replace("|", "/") for reason in reasons))


@contextmanager
def _quiet() -> Any:
    level, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tensors are so small that more of them only wait for each other
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        torch.set_num_threads(threads)


def page(rows: Sequence[Row]) -> str:
    """The page of the documentation."""
    found = versions(("torch", "transformers"))
    lines = [
        "# Models",
        "",
        f"{_made_with(found)}, {now()[:10]}, by `thrift doctor --models docs/models.md`. Not edited by hand; a test compares",
        "it with a run.",
        "",
        "Each row is a tiny random model of the family in float32 on a CPU. All figures are against the model itself, with the",
        "attention that transformers picks for it.",
        "",
        f"- **prompt**: logits of {_PROMPT} tokens at budget 1, which is exact attention, within {TOLERANCE:g} of the largest.",
        "- **causal**: a changed last token leaves all logits before it alone.",
        f"- **generation**: {_NEW_TOKENS} greedy tokens after a batch with padding on the left, tokens and logits.",
        "- **ThriftCache**: the same generation, and a prompt in chunks of "
        f"{', '.join(map(str, _CHUNKS[:-1]))} and {_CHUNKS[-1]} tokens, with K and V in a `ThriftCache` at budget 1.",
        "- **layers**: those that thrift attends, of all layers with attention. The others are computed exactly, by SDPA or a",
        "  plain softmax, for the reason in the last column. On a GPU, sliding windows of long prompts are thrift's, too.",
        "",
        "`refused`: an error with the reason, from `enable`, when the cache is made, or from the forward. `-`: the model",
        "itself cannot do it.",
        "",
        HEADER,
        *(row.markdown() for row in rows),
        "",
    ]
    return "\n".join(lines)


def _made_with(found: dict[str, str | None]) -> str:
    return f"Generated with transformers {found['transformers']} and torch {found['torch']}"


def made_here(text: str) -> bool:
    """Whether a page was made with the transformers that is installed."""
    return f"Generated with transformers {transformers.__version__} " in text


def write(path: Path, say: Callable[[str], None]) -> int:
    """Check all families and write the page.

    Args:
        path: of the page.
        say: takes the row of each family when it is known.

    Returns:
        The exit code: 1 if a row is wrong.

    Raises:
        OSError: the page cannot be written there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)  # minutes follow: what cannot be written fails here
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"the page cannot be written: {path} is a folder, or lies in one that is read-only")
    rows: list[Row] = []
    for family in filter(known, FAMILIES):
        rows.append(check(family))
        say(rows[-1].markdown())
    write_files({path: page(rows).encode()})
    return int(any("wrong" in row.verdicts() for row in rows))
