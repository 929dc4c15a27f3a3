"""Run methods over windows and put everything that was seen into one record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from thrift_attn.config import ThriftConfig, fraction
from thrift_attn.stats import Stats
from thrift_lab.console import Log, Progress, silent, unseen
from thrift_lab.eval.bootstrap import BOOTSTRAP_BLOCK, LEVEL, RESAMPLES, Bootstrap, Interval, interval, recovery
from thrift_lab.eval.methods import Method, check_distinct, described, from_description, ignored_options, looks_ahead
from thrift_lab.eval.nll import (
    Window,
    chars_needed,
    check_head,
    check_length,
    check_reads_text,
    layers_of,
    leading_bos,
    run_window,
    windows_of,
)
from thrift_lab.eval.texts import Text, load_text
from thrift_lab.models import Loaded, load_model
from thrift_lab.provenance import commit, device_name, now, versions
from thrift_lab.records import Record, digest, load_arrays, pack_arrays
from thrift_lab.sheet import Sheet

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "gguf")


class Spent(NamedTuple):
    """Blocks in high precision: share promoted, share the budget asked for, and their share of the softmax mass."""

    share: float
    asked: float
    high_mass: float

    @classmethod
    def of(cls, windows: list[Window]) -> Spent | None:
        """Over all windows; None for the model's own attention."""
        stats = [window.stats for window in windows if window.stats is not None]
        total = sum(stats, Stats())
        return cls(total.share, total.asked_share, total.high_mass) if stats else None


@dataclass(frozen=True)
class NLLRow:
    """One method's line of the result; None where a figure does not exist.

    Args:
        method: what was computed.
        nll: nats per token.
        loss: NLL minus that of fp16.
        loss_interval: 95% interval of ``loss``.
        recovered: share of the fp4-to-fp16 gap that the method brings back.
        recovered_interval: 95% interval of ``recovered``.
        spent: what was promoted; None for fp16.
        seconds: of all windows, the output head left out.
        unserved: layers left to the model's own attention.
    """

    method: Method
    nll: float
    loss: float | None
    loss_interval: Interval | None
    recovered: float | None
    recovered_interval: Interval | None
    spent: Spent | None
    seconds: float
    unserved: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        spent = self.spent
        return {
            "name": self.method.name,
            "config": described(self.method),
            "ignored": ignored_options(self.method),
            "looks_ahead": looks_ahead(self.method),
            "nll": self.nll,
            "loss": self.loss,
            "loss_interval": self.loss_interval,
            "recovered": self.recovered,
            "recovered_interval": self.recovered_interval,
            "share_promoted": spent.share if spent else None,
            "share_asked": spent.asked if spent else None,
            "high_mass": spent.high_mass if spent else None,
            "seconds": self.seconds,
            "unserved": list(self.unserved),
        }

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> NLLRow:
        """The inverse of `to_dict`."""

        def interval(name: str) -> Interval | None:
            return None if row[name] is None else (row[name][0], row[name][1])

        spent = None
        if row["share_promoted"] is not None:
            spent = Spent(row["share_promoted"], row["share_asked"], row["high_mass"])
        return cls(
            method=from_description(row["name"], row["config"]),
            nll=row["nll"],
            loss=row["loss"],
            loss_interval=interval("loss_interval"),
            recovered=row["recovered"],
            recovered_interval=interval("recovered_interval"),
            spent=spent,
            seconds=row["seconds"],
            unserved=tuple(row["unserved"]),
        )


class NLLRecord(Record):
    """All rows of a run, the NLL of every token, and the circumstances.

    Args:
        context: what was run, on what, with what.
        rows: one for each method.
        tokens: int64 ``[windows, length]``.
        nll: float32 ``[windows, length - 1]`` by method, in nats.
    """

    kind: str = "nll"
    rows: list[NLLRow]
    tokens: np.ndarray[Any, Any] = Field(exclude=True)
    nll: dict[str, np.ndarray[Any, Any]] = Field(exclude=True)

    def table(self) -> Sheet:
        """See `Record.table`."""
        context = self.context
        size = context["bootstrap"]["block"]
        return Sheet(
            ("method", "NLL", "vs fp16", "recovered\n[95% interval]", "blocks", "mass", "seconds"),
            [(*_cells(row), f"{row.seconds:.1f}") for row in self.rows],
            title=f"{context['model']['spec']} on {context['text']['spec']}: "
            f"{context['windows']} x {context['length']:,} tokens",
            caption=f"{context['model']['dtype']} on {context['device']}; NLL in nats per token; blocks: share of them in high "
            f"precision, mass: their share of the softmax; paired bootstrap over blocks of {size} tokens",
        )

    def markdown(self) -> str:
        """See `Record.markdown`; seconds are of the machine, not of the method."""
        table = self.table()
        return Sheet(table.head[:-1], [row[:-1] for row in table.rows]).markdown(code=True)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; the context lies flat in the file, arrays are beside it."""
        methods = [row.to_dict() for row in self.rows]
        return {"kind": self.kind, "schema": self.SCHEMA, **self.context, "methods": methods}

    def save(self, path: Path) -> None:
        """Write the record and, beside it, the NLL of every token: both or neither.

        Args:
            path: of the JSON record; its folder is made. The arrays go where `beside` says: ``tokens`` and one array for
                each method.
        """
        arrays = pack_arrays({"tokens": self.tokens, **self.nll})
        names = {"per_token": beside(path).name, "per_token_sha256": digest(arrays)}
        self.model_copy(update={"context": {**self.context, **names}})._write(path, {beside(path): arrays})

    @classmethod
    def from_json(cls, found: dict[str, Any], path: Path) -> NLLRecord:
        """See `Record.from_json`; records of before 2026-11 do not know the digest of their arrays."""
        arrays = load_arrays(path.with_name(found.pop("per_token")), found.pop("per_token_sha256", None))
        rows = [NLLRow.from_dict(row) for row in found.pop("methods")]
        tokens = arrays.pop("tokens")
        del found["kind"]
        return cls(context=found, rows=rows, tokens=tokens, nll=arrays)


def _cells(row: NLLRow) -> tuple[str, ...]:
    """A row in words, but for its seconds."""

    def or_dash(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    recovered = or_dash(row.recovered, ".1%")
    if row.recovered is not None:
        sure = row.recovered_interval
        recovered += " " + (f"[{sure[0] * 100:3.0f}, {sure[1] * 100:3.0f}]" if sure else "")
    elif is_fp4(row.method) and row.loss is not None:
        recovered = "0%" + " " * 11  # by definition
    share, mass = (row.spent.share, row.spent.high_mass) if row.spent else (None, None)
    loss = or_dash(row.loss, "+.4f")
    return row.method.name, f"{row.nll:.4f}", loss, recovered, or_dash(share, ".1%"), or_dash(mass, ".1%")


def beside(path: Path) -> Path:
    """Return the path of the arrays that belong to a record."""
    return path.with_suffix(".npz")


def is_fp4(method: Method) -> bool:
    """Whether a method is uniform fp4: the paper's form without promotion, the far end of the gap."""
    return method.config == ThriftConfig.paper(budget=fraction(0))


def evaluate(
    model: str,
    text: str,
    methods: list[Method],
    *,
    length: int,
    windows: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    log: Log = silent,
    progress: Progress = unseen,
) -> NLLRecord:
    """NLL of every method on the same windows of a text.

    Args:
        model: see `thrift_lab.models.load_model`.
        text: see `thrift_lab.eval.texts.load_text`.
        methods: what to compare; ``fp16`` and ``fp4`` among them give losses and recovered shares.
        length: tokens of a window.
        windows: number of windows.
        device: see `load_model`.
        dtype: see `load_model`.
        log: called with a line of text when something slow starts.
        progress: called after every layer.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, FetchError, MissingExtra: each says what was expected.
    """
    check_distinct(methods)
    for method in methods:
        check_reads_text(method)
    if length < 2 or windows < 1:
        raise ValueError(f"expected a length of at least 2 and at least 1 window, got {length} and {windows}")
    source = load_text(text, chars_needed(length, windows), log)
    loaded = load_model(model, device=device, dtype=dtype, log=log)
    check_length(loaded.model, length)
    log("tokenising")
    tokens = windows_of(loaded.tokenizer, source.content, length, windows)
    check_head(loaded.model, tokens)
    log("")
    runs = _run(loaded, methods, tokens, progress)
    nll = {name: torch.stack([window.nll for window in row]).numpy() for name, row in runs.items()}
    return NLLRecord(
        context=_context(loaded, source, tokens), rows=_rows(methods, runs, nll), tokens=tokens.numpy(), nll=nll
    )


def _run(loaded: Loaded, methods: list[Method], tokens: torch.Tensor, progress: Progress) -> dict[str, list[Window]]:
    """Every method on every window; methods side by side, so that a slow drift of the machine hits all alike."""
    runs: dict[str, list[Window]] = {method.name: [] for method in methods}
    steps = max(1, len(layers_of(loaded.model)))
    total = len(tokens) * len(methods) * steps
    done = 0
    for at, window in enumerate(tokens):
        for method in methods:
            what = f"window {at + 1} of {len(tokens)}: {method.name}"
            start = done

            def on_layer(what: str = what) -> None:
                nonlocal done
                done += 1
                progress(what, done, total)

            progress(what, done, total)
            runs[method.name].append(run_window(loaded.model, method, window, on_layer))
            done = start + steps
    progress("done", total, total)
    return runs


def _rows(methods: list[Method], runs: dict[str, list[Window]], nll: dict[str, NDArray[np.float32]]) -> list[NLLRow]:
    """Figures and intervals of every method."""
    values = {name: array.astype(np.float64) for name, array in nll.items()}
    base = next((values[method.name] for method in methods if method.plain), None)
    fp4 = next((values[method.name] for method in methods if is_fp4(method)), None)
    boot = Bootstrap.over(*next(iter(values.values())).shape)
    rows: list[NLLRow] = []
    for method in methods:
        mine, run = values[method.name], runs[method.name]
        loss = None if base is None or method.plain else mine - base
        back = None
        if loss is not None and base is not None and fp4 is not None and not is_fp4(method):
            back = recovery(boot, loss, fp4 - base)
        rows.append(
            NLLRow(
                method=method,
                nll=float(mine.mean()),
                loss=None if loss is None else float(loss.mean()),
                loss_interval=None if loss is None else interval(boot.means(loss)),
                recovered=back.share if back else None,
                recovered_interval=back.interval if back else None,
                spent=Spent.of(run),
                seconds=sum(window.seconds for window in run),
                unserved=run[0].unserved,
            )
        )
    return rows


def _context(loaded: Loaded, text: Text, tokens: torch.Tensor) -> dict[str, Any]:
    """Everything needed to know what was measured, and to measure it again."""
    model = loaded.model
    config = model.config.get_text_config()
    keys = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    keys += ("max_position_embeddings", "vocab_size")
    return {
        "created": now(),
        "model": {
            "spec": loaded.spec,
            "gguf_sha256": loaded.sha256,
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            **{key: getattr(config, key, None) for key in keys},
        },
        "text": {"spec": text.name, "sha256": text.sha256, "characters": len(text.content)},
        "windows": tokens.shape[0],
        "length": tokens.shape[1],
        "scored_tokens": tokens.shape[0] * (tokens.shape[1] - 1),
        "bos": leading_bos(loaded.tokenizer),
        "bootstrap": {"block": BOOTSTRAP_BLOCK, "resamples": RESAMPLES, "level": LEVEL, "seed": 0},
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "versions": versions(PACKAGES),
        "commit": commit(),
    }
