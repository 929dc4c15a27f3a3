"""Ready plans for `thrift eval suite`."""

from __future__ import annotations

from thrift_attn.config import fraction
from thrift_lab.eval.cost import at_equal_cost
from thrift_lab.eval.methods import Method, parse_method
from thrift_lab.eval.suite_folder import STANDIN, SuitePlan

SPARSE = ("quest", "topk", "local", "snapkv")
BUDGETS = ("0.01", "0.02", "0.05", "0.1", "0.25", "paper")


def with_baselines(specs: list[str], to: str) -> str:
    """Specs, and every sparse baseline at the cost of one of them, see `thrift_lab.eval.cost.at_equal_cost`."""
    target = parse_method(to)
    return ",".join([*specs, *(at_equal_cost(kind, target).name for kind in SPARSE)])


def equal(kind: str, to: str) -> Method:
    """One baseline at the cost of a method."""
    if kind not in SPARSE:
        raise ValueError(f"baseline must be one of {', '.join(SPARSE)}, got {kind!r}")
    return at_equal_cost(kind, parse_method(to))


def quick(model: str = "smollm2-135m") -> SuitePlan:
    """Every family of tasks and methods once, in minutes on a CPU: a check that all of it runs, too small to rank methods.

    832 tokens are 13 blocks, so the budget is a quarter of them.
    """
    specs = ["fp16", "fp4", "paper:budget=0.25", "thrift:budget=0.25"]
    return SuitePlan(
        model=model,
        methods=with_baselines(specs, "thrift:budget=0.25"),
        texts=("shakespeare",),
        nll_lengths=(512, 1024),
        tasks="ruler_niah_single_1,ruler_vt,ruler_fwe,ruler_qa_1,helmet_json_kv,helmet_nq,longbench_trec",
        lengths=(832,),
        samples=1,
        max_new=16,
        data=STANDIN,
        concentration=512,
    )


def full(model: str = "smollm2-135m", longest: int = 8192) -> SuitePlan:
    """Every task, every method and budget, up to the context of the model; for a GPU.

    Args:
        model: see `thrift_lab.models.load_model`.
        longest: most tokens; a half and a quarter of it are run as well.
    """
    specs = ["fp16", "fp4", "fp4:base_format=mxfp4"]
    for kind in ("paper", "thrift"):
        default = parse_method(kind)
        for budget in BUDGETS:
            same = budget != "paper" and default.config is not None and fraction(float(budget)) == default.config.budget
            specs.append(kind if same else f"{kind}:budget={budget}")
    specs.append("thrift:math=16bit")
    return SuitePlan(
        model=model,
        methods=with_baselines(specs, "thrift"),
        texts=("shakespeare", "pg19"),
        nll_lengths=(longest // 4, longest // 2, longest),
        windows=4,
        tasks="all",
        lengths=(longest // 4, longest // 2, longest),
        samples=20,
        data=None,
        hub=True,
        concentration=longest,
    )


PRESETS = {"quick": quick, "full": full}
