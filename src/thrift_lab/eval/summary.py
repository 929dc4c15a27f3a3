"""From the lines of a run to means, losses, recovered shares and their intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrift_lab.eval.bootstrap import BOOTSTRAP_BLOCK, LEVEL, RESAMPLES, Interval, draws, interval
from thrift_lab.eval.cost import TYPICAL, costs
from thrift_lab.eval.methods import Method, described, ignored_options
from thrift_lab.eval.rivals.share_of_mass import ShareOfMass
from thrift_lab.eval.run_nll import is_fp4

Records = Sequence[dict[str, Any]]
Floats = NDArray[np.float64]


def summarise(methods: list[Method], records: Records, head_dim: int = 128) -> dict[str, Any]:
    """Metrics of a run, finished or not, as plain JSON values.

    Args:
        methods: of the run.
        records: its lines.
        head_dim: of the model, for costs.

    Returns:
        ``methods``: cost of each. ``nll``: one row per text (``all`` for all of them), length and method. ``tasks``: one row
        per task (and per family, and ``all``), length and method, with the score and the NLL of the right answer.
        ``concentration``: the share of the error in the first blocks by mass. Losses and shares compare only samples that
        all methods in question have finished.
    """
    return {
        "level": LEVEL,
        "resamples": RESAMPLES,
        "methods": [_method(method, records, head_dim) for method in methods],
        "nll": _nll(methods, [r for r in records if r["kind"] == "nll"]),
        "positions": _positions(methods, [r for r in records if r["kind"] == "nll"]),
        "tasks": _tasks(methods, [r for r in records if r["kind"] == "task"]),
        "concentration": [_concentration(r) for r in records if r["kind"] == "concentration"],
    }


def _method(method: Method, records: Records, head_dim: int) -> dict[str, Any]:
    """Name, configuration, share of the blocks and cost."""
    mine = [r for r in records if r["method"] == method.name and r.get("share") is not None]
    longest = max((r["length"] for r in mine), default=0)  # a share of few blocks is another
    share = float(np.mean([r["share"] for r in mine if r["length"] == longest])) if mine else None
    known = method.config is None or share is not None or method.config.budget.kind == "fraction"
    known = known and not (share is None and isinstance(method.rival, ShareOfMass))
    length = max((r["length"] for r in records if r["method"] == method.name), default=TYPICAL)
    cost = costs(method, share, head_dim, length) if known else None
    return {
        "name": method.name,
        "family": method.family,
        "plain": method.plain,
        "fp4": is_fp4(method),
        "sparse": method.evict is not None or (method.config is not None and method.config.base_format == "drop"),
        "config": described(method),
        "ignored": ignored_options(method),
        "share": share,
        "prefill_cost": None if cost is None else cost.prefill,
        "decode_cost": None if cost is None else cost.read,
        "stored": None if cost is None else cost.stored,
        "unserved": sorted({line for r in mine for line in r["unserved"]}),
    }


def _grouped(records: Records, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in keys)].append(record)
    return groups


class _Paired:
    """Units (blocks of tokens, or samples) that several methods have in common, and resamples of them."""

    def __init__(self, values: dict[str, Floats], sizes: Floats):
        self.values, self.sizes = values, sizes
        self.weights = draws(len(sizes)) if len(sizes) > 1 else None
        self.drawn = None if self.weights is None else self.weights @ sizes  # total size of every resample

    def mean(self, x: Floats) -> float:
        return float(x.sum() / self.sizes.sum())

    def means(self, x: Floats) -> Floats | None:
        return None if self.weights is None or self.drawn is None else (self.weights @ x) / self.drawn

    def loss(self, name: str, base: str | None) -> dict[str, Any]:
        """Difference to the base with its interval."""
        if base is None or name == base:
            return {"loss": None, "loss_interval": None}
        gap = self.values[name] - self.values[base]
        return {"loss": self.mean(gap), "loss_interval": interval(self.means(gap))}

    def recovered(self, name: str, base: str | None, fp4: str | None) -> dict[str, Any]:
        """Share of the fp4 loss that a method brings back; None where fp4 is not worse at the 95% level."""
        nothing: dict[str, Any] = {"recovered": None, "recovered_interval": None}
        if base is None or fp4 is None or name in (base, fp4):
            return nothing
        gap, loss = self.values[fp4] - self.values[base], self.values[name] - self.values[base]
        gaps, losses = self.means(gap), self.means(loss)
        if gaps is None or losses is None or self.mean(gap) <= 0 or np.quantile(gaps, (1 - LEVEL) / 2) <= 0:
            return nothing
        kept = gaps > 0
        bounds: Interval | None = interval(1 - losses[kept] / gaps[kept])
        return {"recovered": 1 - self.mean(loss) / self.mean(gap), "recovered_interval": bounds}


def _by_method(records: Records) -> dict[str, dict[Any, dict[str, Any]]]:
    """Records by method and by (task, index)."""
    by_method: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        by_method[record["method"]][record["task"], record["index"]] = record
    return by_method


def _common(methods: list[Method], by_method: dict[str, dict[Any, Any]]) -> tuple[list[str], list[Any]]:
    """Methods that have finished anything, and the units that all of them have finished."""
    names = [method.name for method in methods if by_method.get(method.name)]
    shared = set.intersection(*(set(by_method[name]) for name in names)) if names else set()
    return names, sorted(shared)


def _ends(methods: list[Method], names: list[str]) -> tuple[str | None, str | None]:
    base = next((m.name for m in methods if m.plain and m.name in names), None)
    return base, next((m.name for m in methods if is_fp4(m) and m.name in names), None)


def _nll(methods: list[Method], records: Records) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    texts = list(dict.fromkeys(r["task"] for r in records))
    for length in sorted({r["length"] for r in records}):
        for text in [*texts, *(["all"] if len(texts) > 1 else [])]:
            mine = [r for r in records if r["length"] == length and text in ("all", r["task"])]
            done = _by_method(mine)
            names, shared = _common(methods, done)
            if not shared:
                continue
            values = {name: np.concatenate([done[name][unit]["sums"] for unit in shared]) for name in names}
            sizes = np.concatenate([_sizes(done[names[0]][unit]["tokens"]) for unit in shared])
            pairs = _Paired(values, sizes)
            base, fp4 = _ends(methods, names)
            for name in names:
                row = {"text": text, "length": length, "method": name, "windows": len(shared)}
                row |= {"tokens": int(sizes.sum()), "nll": pairs.mean(values[name])}
                rows.append(row | pairs.loss(name, base) | pairs.recovered(name, base, fp4))
    return rows


def _sizes(tokens: int) -> Floats:
    starts = np.arange(0, tokens, BOOTSTRAP_BLOCK)
    return np.diff(starts, append=tokens).astype(np.float64)


def _positions(methods: list[Method], records: Records, parts: int = 8) -> list[dict[str, Any]]:
    """Loss against fp16 by position, in eighths of the longest window."""
    if not records:
        return []
    length = max(r["length"] for r in records)
    done = _by_method([r for r in records if r["length"] == length])
    names, shared = _common(methods, done)
    base, _ = _ends(methods, names)
    if base is None or not shared:
        return []
    rows = []
    sizes = _sizes(done[base][shared[0]]["tokens"])
    edges = np.linspace(0, len(sizes), min(parts, len(sizes)) + 1).astype(int)
    for name in names:
        if name == base:
            continue
        gaps = np.array([np.subtract(done[name][unit]["sums"], done[base][unit]["sums"]) for unit in shared])
        for low, high in pairwise(edges):
            pairs = _Paired({}, np.tile(sizes[low:high], len(shared)))
            part = gaps[:, low:high].ravel()
            place = {
                "method": name,
                "length": length,
                "from": int(low) * BOOTSTRAP_BLOCK,
                "to": min(length, int(high) * BOOTSTRAP_BLOCK),
            }
            rows.append(place | {"loss": pairs.mean(part), "loss_interval": interval(pairs.means(part))})
    return rows


def _tasks(methods: list[Method], records: Records) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    families = list(dict.fromkeys(r["family"] for r in records))
    groups = [(task, family) for (task, family) in _grouped(records, "task", "family")]
    for length in sorted({r["length"] for r in records}):
        for name, family in [*groups, *((family, family) for family in families), ("all", "all")]:
            mine = [r for r in records if r["length"] == length and name in ("all", r["task"], r["family"])]
            done = _by_method(mine)
            names, shared = _common(methods, done)
            if not shared:
                continue
            ones = np.ones(len(shared))
            base, fp4 = _ends(methods, names)
            scores = _Paired({m: np.array([done[m][u]["score"] for u in shared], float) for m in names}, ones)
            gold = _Paired({m: np.array([done[m][u]["gold_nll"] for u in shared], float) for m in names}, ones)
            metrics = {r["metric"] for r in mine}
            metric = metrics.pop() if len(metrics) == 1 else "mixed"
            for method in names:
                difference = scores.loss(method, base)
                likely = gold.loss(method, base) | gold.recovered(method, base, fp4)
                rows.append(
                    {
                        "task": name,
                        "family": family,
                        "group": name in ("all", *families),
                        "metric": metric,
                        "length": length,
                        "method": method,
                        "samples": len(shared),
                        "score": scores.mean(scores.values[method]),
                        "score_interval": interval(scores.means(scores.values[method])),
                        "difference": difference["loss"],
                        "difference_interval": difference["loss_interval"],
                        "gold_nll": gold.mean(gold.values[method]),
                        **{f"gold_{key}": value for key, value in likely.items()},
                    }
                )
    return rows


def _concentration(record: dict[str, Any]) -> dict[str, Any]:
    """Means over heads, and per layer, of the share of the error in the first blocks by mass."""
    heads = record["heads"]
    shares = np.array([head["shares"] for head in heads])
    mass = np.array([head["mass"] for head in heads])
    errors = np.array([head["error"] for head in heads])
    layers = np.array([head["layer"] for head in heads])
    low, high = np.quantile(shares, [0.1, 0.9], axis=0)
    return {
        "text": record["task"],
        "length": record["length"],
        "heads": len(heads),
        "shares": record["shares"],
        "error_share": shares.mean(0).tolist(),
        "error_share_low": low.tolist(),
        "error_share_high": high.tolist(),
        "mass_share": mass.mean(0).tolist(),
        "layers": [
            {
                "layer": int(layer),
                "error": float(np.median(errors[layers == layer])),
                "error_share": shares[layers == layer].mean(0).tolist(),
            }
            for layer in np.unique(layers)
        ],
    }
