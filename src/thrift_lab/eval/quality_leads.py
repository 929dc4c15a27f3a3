"""The picture of where the loss of 4-bit attention comes from, from an exploration's record: ``thrift eval leads``."""

from __future__ import annotations

from pathlib import Path

from thrift_lab.records import read_json
from thrift_lab.style import COLOURS, OTHER, canvas, legend, save

ROWS = (
    "block", "Q only", "K only", "V only", "P only", "all", "all, rounded", "all, V less its mean",
    "all, V less its mean, oracle", "block, 16bit",
)  # fmt: skip
"""Variants from top to bottom, as the record names them."""


def draw(record: Path, path: Path) -> Path:
    """Draw nats by variant, and the error of outputs by layer when one operand alone is rounded.

    Args:
        record: ``quality-leads.json``.
        path: of the picture.

    Raises:
        ValueError: another file.
        MissingExtra: matplotlib is not installed.
    """
    content = read_json(record)
    if not isinstance(content, dict) or not {"nll", "output_error"} <= set(content):
        raise ValueError(f"{record} is not the record of this exploration: no nll and output_error in it")
    figure, (left, *others) = canvas(13, 4, columns=3, width_ratios=(1.3, 1, 1))
    nll = {row["name"]: row["nats"] for row in content["nll"] if row["budget"] == 0.05}
    for y, name in enumerate(reversed(ROWS)):
        values = nll[name]
        shade = OTHER[0] if "only" in name else COLOURS["thrift"]
        left.barh(y, sum(values) / len(values), color=shade, height=0.6)
        left.plot(values, [y] * len(values), "k.", markersize=4)
    left.set(yticks=range(len(ROWS)), yticklabels=list(reversed(ROWS)), xlabel="nats above exact attention")
    left.set_title("SmolLM2-135M, 8,192 tokens, 5%; a dot per text")
    for axes, (model, table) in zip(others, content["output_error"].items(), strict=True):
        layers = table["layers"]
        for i, (name, errors) in enumerate(table["percent"].items()):
            axes.bar([x + i * 0.2 for x in range(len(layers))], errors, 0.2, label=name, color=OTHER[i])
        axes.set(xticks=[x + 0.3 for x in range(len(layers))], xticklabels=layers, xlabel="layer", yscale="log")
        axes.set(ylabel="output error, %", yticks=(2, 3, 5, 10, 20), yticklabels=(2, 3, 5, 10, 20))
        axes.minorticks_off()
        axes.set_title(f"{model}, 4,096 tokens,\nonly this operand rounded")
        legend(axes)
    return save(figure, path)
