"""The paper's tables and figures as plans: what is run, at which commits of models and data, and what the paper says.

Figures of the paper stand here only where its text or its authors' repository gives them; a plan says of the others that they
are not at hand. Source: arXiv 2605.23081 and github.com/joesharratt1229/ThriftAttention (README.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from thrift_lab.eval.suite_folder import STANDIN, SuitePlan


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper.

    Args:
        name: for people and folders.
        spec: with the commit of the hub that is pinned.
        parameters: in billions.
        layers: attention layers.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: D.
    """

    name: str
    spec: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128


MODELS = (
    PaperModel(
        "llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct@0e9e39f249a16976918f6564b8830bc894c89659", 8.0, 32, 32, 8
    ),
    PaperModel("qwen3-8b", "Qwen/Qwen3-8B@b968826d9c46dd6066d109eabc6255188de91218", 8.2, 36, 32, 8),
    PaperModel(
        "ministral-8b", "mistralai/Ministral-8B-Instruct-2410@2f494a194c5b980dfb9772cb92d26cbb671fce5a", 8.0, 36, 32, 8
    ),
)
"""The paper says Llama-3.1-8B, Qwen3-8B and Ministral-8B. Sliding layers of Ministral are left to the model's own attention."""

PG19 = "pg19"
"""emozilla/pg19 at the commit that `thrift_lab.eval.texts` pins."""

BUDGETS = ("0.01", "0.05", "0.1", "0.25")
METHODS = ",".join(
    ["fp16", "fp4", *(f"{kind}:budget={budget}" for kind in ("paper", "peer", "thrift") for budget in BUDGETS)]
)
FEW = "fp16,fp4,paper,peer,thrift"
SPARSE = "fp16,fp4,paper,thrift,quest:budget=0.295,topk:budget=0.295,local:budget=0.295"
FRONTIER = (
    "fp16,fp4,paper,peer,thrift,thrift:budget=0.02,thrift:budget=0.1,thrift:compute=16bit,promoted_storage=nested,"
    "thrift:compute=16bit,promoted_storage=nested,budget=0.02,thrift:budget=0,compute=16bit,fp8kv,nvfp4kv,nvfp4kv:scales=best,"
    "kivi:bits=4,kivi:bits=2,turboquant:bits=4,turboquant:bits=3,diagonal,quest:budget=0.295,topk:budget=0.295"
)


@dataclass(frozen=True)
class Published:
    """A figure of the paper.

    Args:
        method: as `thrift eval` names it.
        what: the figure's name.
        value: as printed, or None where it is not at hand.
        where: it stands.
    """

    method: str
    what: str
    value: float | None
    where: str


@dataclass(frozen=True)
class Stage:
    """One run of a plan: a folder of its own.

    Args:
        name: of the folder.
        plan: what `thrift eval suite` runs.
        model: for estimates; None offline.
    """

    name: str
    plan: SuitePlan
    model: PaperModel | None = None


@dataclass(frozen=True)
class PaperTable:
    """One table or figure.

    Args:
        name: what `thrift reproduce` takes.
        about: what it shows.
        lengths: tokens.
        methods: specs.
        windows: NLL windows of each length; 0 for none.
        tasks: names or families; empty for none.
        samples: of each task and length.
        concentration: tokens; 0 for none.
        published: what the paper says.
        data: whether published files of tasks are needed.
    """

    name: str
    about: str
    lengths: tuple[int, ...]
    methods: str
    windows: int = 0
    tasks: str = ""
    samples: int = 1
    concentration: int = 0
    published: tuple[Published, ...] = ()
    data: bool = False

    def stages(self, data: str | None) -> list[Stage]:
        """One run for each of the paper's models."""
        return [Stage(model.name, self._plan(model.spec, PG19, self.lengths, data), model) for model in MODELS]

    def offline(self, model: str, text: str, length: int) -> list[Stage]:
        """The same on a small model with a text at hand and stand-ins for published files: says nothing about the paper."""
        few = self._plan(model, text, (length,), STANDIN if self.data else None)
        tasks = _SMALL.get(self.name, "")
        small = {
            **few.to_dict(),
            "windows": min(1, self.windows) or 1,
            "samples": 1,
            "tasks": tasks,
            "max_new": 4,
            "chat": False,
        }
        small |= {"concentration": min(self.concentration, length), "texts": (text,)}
        small |= {"nll_lengths": (length,) if self.windows else (), "lengths": (length,) if tasks else ()}
        return [Stage("offline", SuitePlan(**small))]

    def _plan(self, model: str, text: str, lengths: tuple[int, ...], data: str | None) -> SuitePlan:
        return SuitePlan(
            model=model, methods=self.methods, texts=(text,), nll_lengths=lengths if self.windows else (),
            windows=max(1, self.windows), tasks=self.tasks, lengths=lengths if self.tasks else (), samples=self.samples,
            chat=bool(self.tasks), data=data if self.data else None, concentration=self.concentration,
        )  # fmt: skip


_SMALL = {
    "ruler": "ruler_niah_single_1",
    "helmet": "helmet_json_kv",
    "longbench": "longbench_passage_count",
    "average": "ruler_niah_single_1,longbench_passage_count",
}
"""Tasks of an offline run."""

_README = "average over RULER, HELMET and LongBench-v1 of three models, authors' README"


def _mean(*scores: tuple[str, float]) -> tuple[Published, ...]:
    return tuple(Published(method, "mean score", value, _README) for method, value in scores)


_LONG = (8192, 16384, 32768, 65536, 131072)
_AVERAGE = (
    *_mean(
        ("fp16", 0.469),
        ("fp4", 0.247),
        ("paper:budget=0.05", 0.452),
        ("paper:budget=0.1", 0.458),
        ("paper:budget=0.25", 0.459),
    ),
    Published("paper:budget=0.05", "recovered share", 0.891, "abstract"),
)

TABLES: dict[str, PaperTable] = {
    table.name: table
    for table in (
        PaperTable("nll", "NLL of PG-19 by budget and length", _LONG, METHODS, windows=4),
        PaperTable(
            "concentration", "share of the 4-bit error in the first blocks by mass", (8192,), "fp16", concentration=8192
        ),
        PaperTable("sparse", "dropping blocks at equal cost", (32768, 131072), SPARSE, windows=2),
        PaperTable("frontier", "recovery against cost at 131,072 tokens, with rivals", (131072,), FRONTIER, windows=1),
        PaperTable("ruler", "RULER, 13 tasks", (32768, 65536), FEW, tasks="ruler", samples=20, data=True),
        PaperTable("helmet", "HELMET: recall and retrieval", (65536,), FEW, tasks="helmet", samples=20, data=True),
        PaperTable("longbench", "LongBench v1, 16 English tasks", (32768,), FEW, tasks="longbench", samples=20, data=True),
        PaperTable(
            "average", "mean over RULER, HELMET and LongBench v1 by budget", (32768,),
            "fp16,fp4,paper:budget=0.05,paper:budget=0.1,paper:budget=0.25,peer:budget=0.05,thrift:budget=0.05",
            tasks="all", samples=20, data=True, published=_AVERAGE,
        ),
    )
}  # fmt: skip
