"""All tasks under one roof."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from thrift_lab.eval.tasks import helmet, longbench, ruler
from thrift_lab.eval.tasks.base import Task

FAMILIES = ("ruler", "helmet", "longbench")

NEEDED: dict[str, str] = {
    "ruler_qa_1": "ruler/squad.json (SQuAD 2.0, dev-v2.0.json)",
    "ruler_qa_2": "ruler/hotpot.json (HotpotQA, hotpot_dev_distractor_v1.json)",
    **{
        f"helmet_{name}": f"helmet/{name}.jsonl and helmet/{name}_demos.jsonl (HELMET data, kilt)"
        for name in helmet.RAG
    },
    "helmet_narrativeqa": "helmet/narrativeqa.jsonl (HELMET's rows: context, question, answer)",
    **{f"longbench_{name}": f"longbench/{name}.jsonl (LongBench v1)" for name in longbench.TABLE},
}
"""What has to lie in the data folder for a task."""


@dataclass(frozen=True)
class Table:
    """The tasks that can run, by name, and what the others lack."""

    tasks: dict[str, Task]
    lacking: dict[str, str]

    def choose(self, wanted: str) -> list[Task]:
        """Tasks from a comma-separated list of names, families or ``all``.

        Raises:
            ValueError: an unknown name, or one whose data are not there.
        """
        chosen: dict[str, Task] = {}
        for name in filter(None, (piece.strip() for piece in wanted.split(","))):
            if name in self.lacking:
                raise ValueError(f"task {name} needs {self.lacking[name]} in the folder of --data")
            found = {key: task for key, task in self.tasks.items() if name in ("all", key, task.family)}
            if not found:
                known = ", ".join([*FAMILIES, *self.tasks, *self.lacking])
                raise ValueError(f"unknown task {name!r}: there are all, {known}")
            chosen |= found
        return list(chosen.values())

    def left_out(self, wanted: str) -> dict[str, str]:
        """Tasks of the families asked for that cannot run, and what they need."""
        names = {piece.strip() for piece in wanted.split(",")}
        return {key: files for key, files in self.lacking.items() if names & {"all", key.partition("_")[0]}}


def table(essay: str, data: Path | None = None, *, hub: bool = False, seed: int = 0) -> Table:
    """Every task whose data are at hand.

    Args:
        essay: text of RULER's haystacks.
        data: folder with ``ruler``, ``helmet`` and ``longbench`` in it, see `NEEDED`.
        hub: read LongBench from the hub.
        seed: of the generated tasks.

    Raises:
        FileNotFoundError: no such folder.
        MissingExtra: ``hub`` without the hub's client.
    """
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"no folder {str(data)!r} with the data of the tasks")

    def there(name: str) -> Path | None:
        return data / name if data is not None and (data / name).exists() else None

    found: list[Task] = [
        *ruler.tasks(essay, there("ruler/squad.json"), there("ruler/hotpot.json"), seed),
        *helmet.tasks(there("helmet"), seed),
        *longbench.tasks(there("longbench"), hub),
    ]
    tasks = {task.name: task for task in found}
    return Table(tasks, {name: files for name, files in NEEDED.items() if name not in tasks})
