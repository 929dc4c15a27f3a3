"""Draw docs/images/quality-leads.png from the record quality-leads.json: where the loss of 4-bit attention comes from."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
ROWS = (
    "block", "Q only", "K only", "V only", "P only", "all", "all, rounded", "all, V less its mean",
    "all, V less its mean, oracle",
    "block, 16bit",
)  # fmt: skip


def main() -> None:
    record = json.loads((ROOT / "benchmarks/results/h100/quality-leads.json").read_text())
    figure, (left, *others) = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(1.3, 1, 1), layout="constrained")
    nll = {row["name"]: row["nats"] for row in record["nll"] if row["budget"] == 0.05}
    for y, name in enumerate(reversed(ROWS)):
        values = nll[name]
        left.barh(y, sum(values) / len(values), color="#4878a8" if "only" not in name else "#a87848", height=0.6)
        left.plot(values, [y] * len(values), "k.", markersize=4)
    left.set(yticks=range(len(ROWS)), yticklabels=list(reversed(ROWS)), xlabel="nats above exact attention")
    left.set_title("SmolLM2-135M, 8,192 tokens, 5%; a dot per text", fontsize=9)
    for axes, (model, table) in zip(others, record["output_error"].items(), strict=True):
        layers = table["layers"]
        for i, (name, errors) in enumerate(table["percent"].items()):
            axes.bar([x + i * 0.2 for x in range(len(layers))], errors, 0.2, label=name)
        axes.set(xticks=[x + 0.3 for x in range(len(layers))], xticklabels=layers, xlabel="layer", yscale="log")
        axes.set(ylabel="output error, %", yticks=(2, 3, 5, 10, 20), yticklabels=(2, 3, 5, 10, 20))
        axes.minorticks_off()
        axes.set_title(f"{model}, 4,096 tokens,\nonly this operand rounded", fontsize=9)
        axes.legend(fontsize=8)
    figure.savefig(ROOT / "docs/images/quality-leads.png", dpi=110)


if __name__ == "__main__":
    main()
