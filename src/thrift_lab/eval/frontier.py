"""Which methods nothing beats: bytes per token, or multiplications, against nats above exact attention.

A method is on the frontier when no other has both less cost and less loss. Prefill is compared at multiplications, where Q and
P may be rounded; decode at the bytes of the cache that a step reads, where they stay in 16 bits. Sparse methods stand in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thrift_lab.eval.runs import Run
from thrift_lab.sheet import Sheet
from thrift_lab.style import INK, MARKERS, SMALL, SOFT, canvas, colour, legend, save

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Point:
    """One method at one length.

    Args:
        method: its name.
        family: the name without its budget.
        prefill: multiplications, dense 16-bit attention being 1.
        stored: bytes of the cache for a token of the whole model.
        read: bytes of the cache that a step of decode reads for a token of the context.
        loss: nats above exact attention.
        interval: 95%, or None.
        phases: where it is compared.
        oracle: whether it knows what no method can know; such a point is drawn, and beats nobody.
    """

    method: str
    family: str
    prefill: float
    stored: float
    read: float
    loss: float
    interval: tuple[float, float] | None
    phases: tuple[Phase, ...]
    oracle: bool = False

    def cost(self, phase: Phase) -> float:
        """Return what the method pays in a phase."""
        return self.prefill if phase == "prefill" else self.read


def token_bytes(run: Run) -> int:
    """Bytes of K and V of one token in 16 bits, all layers and KV heads of a model."""
    model = run.environments[-1]["model"]
    head_dim = model["head_dim"] or model["hidden_size"] // model["num_attention_heads"]
    return 4 * head_dim * model["num_hidden_layers"] * model["num_key_value_heads"]


def points_of(run: Run, length: int | None = None) -> list[Point]:
    """Every method of a run that has a loss and a cost, at its longest (or the given) length, over all texts."""
    about, size = run.methods(), token_bytes(run)
    found = []
    for row in run.nll(length):
        method = about[row["method"]]
        if row["loss"] is None or method["prefill_cost"] is None:
            continue
        bounds = row["loss_interval"]
        found.append(
            Point(
                row["method"], method["family"], method["prefill_cost"], size * method["stored"], size * method["decode_cost"],
                row["loss"], None if bounds is None else (bounds[0], bounds[1]), _phases(method),
                oracle=(method["config"] or {}).get("score") == "oracle",
            )
        )  # fmt: skip
    return found


def _phases(method: dict[str, Any]) -> tuple[Phase, ...]:
    """Where a method is compared: what rounds Q and P is prefill, what computes in 16 bits is decode, sparse ones are both."""
    config = method["config"] or {}
    if method["sparse"] or config.get("base_format") == "drop":
        return PHASES
    if config.get("compute") == "16bit" or method["prefill_cost"] >= 1:
        return ("decode",)
    return ("prefill",)


def frontier(points: list[Point], phase: Phase) -> list[Point]:
    """The points of a phase that no other beats in both cost and loss, by cost."""
    best: list[Point] = []
    for point in sorted(
        (p for p in points if phase in p.phases and not p.oracle), key=lambda p: (p.cost(phase), p.loss)
    ):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def beaten_by(point: Point, points: list[Point], phase: Phase) -> list[Point]:
    """Those that cost no more and lose less, surely: their interval ends below the point's."""
    return [
        other
        for other in points
        if phase in other.phases
        and not other.oracle
        and other.cost(phase) <= point.cost(phase)
        and other.loss < point.loss
        and (other.interval is None or point.interval is None or other.interval[1] < point.interval[0])
    ]


def markdown(run: Run, points: list[Point]) -> str:
    """A table by loss, with what is on a frontier in bold, and a sentence about each of this package's methods."""
    ends = {phase: {p.method for p in frontier(points, phase)} for phase in PHASES}
    head = ("method", "bytes stored a token", "bytes read a token", "prefill cost", "nats above exact", "frontier")
    rows = []
    for point in sorted(points, key=lambda p: p.loss):
        on = [phase for phase in point.phases if point.method in ends[phase]]
        bounds = "" if point.interval is None else f" [{point.interval[0]:+.4f}, {point.interval[1]:+.4f}]"
        costs = (f"{point.stored:,.0f}", f"{point.read:,.0f}", f"{point.prefill:.3f}")
        rows.append((point.method, *costs, f"{point.loss:+.4f}{bounds}", ", ".join(on) or "-"))
    table = Sheet(head, rows).markdown(code=True)
    return "\n".join([f"{run.plan['model']}, {run.longest:,} tokens:", "", table, "", *verdicts(points)]) + "\n"


def verdicts(points: list[Point]) -> list[str]:
    """A sentence about each phase of each method of this package: on the frontier, or beaten by whom."""
    said = []
    for point in points:
        if point.method.partition(":")[0] != "thrift" or point.oracle:
            continue
        for phase in point.phases:
            if point in frontier(points, phase):
                said.append(f"`{point.method}` is on the frontier of {phase}.")
                continue
            sure = beaten_by(point, points, phase)
            names = ", ".join(f"`{other.method}`" for other in sure)
            said.append(
                f"`{point.method}` is not on the frontier of {phase}: "
                + (f"{names} cost{'s' * (len(sure) == 1)} no more and lose{'s' * (len(sure) == 1)} less."
                   if sure else "others cost no more and lose less, within the 95% interval.")
            )  # fmt: skip
    return said


def draw(runs: list[Run], path: Path) -> Path:
    """Write the chart: for each model a panel of prefill and one of decode.

    Raises:
        ValueError: no run has a method with a loss and a cost.
        MissingExtra: matplotlib is not installed.
    """
    panels: list[tuple[Run, list[Point], Phase]] = [
        (run, points, phase) for run in runs if (points := points_of(run)) for phase in PHASES
    ]
    if not panels:
        raise ValueError("nothing to draw: no method has both a loss against fp16 and a cost")
    figure, axes = canvas(1.2 + 4.2 * len(panels), 4.6, len(panels))
    shown: dict[str, Any] = {}
    for ax, (run, points, phase) in zip(axes, panels, strict=True):
        mine = [point for point in points if phase in point.phases]
        if not mine:
            ax.set_axis_off()
            continue
        best = frontier(points, phase)
        xs = [point.cost(phase) for point in best]
        ax.step(xs, [point.loss for point in best], where="post", color=SOFT, linestyle=(0, (4, 3)), linewidth=1)
        for point in mine:
            _dot(ax, point, phase, shown)
        ax.set_yscale("symlog", linthresh=1e-3)
        ax.axhline(0, color=SOFT, linewidth=0.8)
        unit = "multiplications, dense 16-bit is 1" if phase == "prefill" else "bytes of the cache read for a token"
        ax.set_xlabel(unit)
        ax.set_title(f"{run.plan['model']}, {phase}, {run.longest:,} tokens", loc="left", color=INK)
        ax.grid(axis="y")
    axes[0].set_ylabel("nats above exact attention")
    legend(
        figure, list(shown.values()), list(shown), loc="outside lower center", ncols=5, frameon=False, fontsize=SMALL
    )
    return save(figure, path)


def _dot(ax: Any, point: Point, phase: Phase, shown: dict[str, Any]) -> None:
    """One method with its interval."""
    names = list(shown)
    at = names.index(point.family) if point.family in names else len(names)
    bar = [[0.0], [0.0]]
    if point.interval is not None:
        bar = [[max(0.0, point.loss - point.interval[0])], [max(0.0, point.interval[1] - point.loss)]]
    drawn = ax.errorbar(
        [point.cost(phase)], [point.loss], yerr=bar, fmt=MARKERS[at % len(MARKERS)], color=colour(point.family), markersize=5,
        markerfacecolor="white" if ":" in point.family else colour(point.family), elinewidth=0.9, capsize=2,
    )  # fmt: skip
    shown.setdefault(point.family, drawn)
