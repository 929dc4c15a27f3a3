"""HELMET: synthetic recall (JSON KV) made at any length; RAG and NarrativeQA from files of the published form.

Source: HELMET (arXiv 2410.02694), sections 2 and 3, and its repository's prompts. Two examples before the question, as
published. Scores: normalised substring match for recall and RAG; for NarrativeQA F1 of words (the paper asks a large
language model for a grade, which needs a service, and reports ROUGE besides).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from thrift_lab.eval.tasks.base import Encoder, Sample, dice, fit, shorten
from thrift_lab.eval.tasks.metrics import Metric, best, contains, f1

SHOTS = 2
RAG = ("nq", "triviaqa", "hotpotqa", "popqa")
"""The retrieval sets: files ``NAME.jsonl`` and, for the examples, ``NAME_demos.jsonl``."""

_KV = "{context}\n\nExtract the value corresponding to the specified key in the JSON object below.\n\n{demos}Key: {key}"
_RAG = (
    "Use the given documents to write a concise and short answer to the question. Write your answer in the following "
    "format:\nAnswer: [answer]\n\n{demos}{context}\n\nQuestion: {question}"
)
_STORY = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question as concisely "
    "as you can, using a single phrase if possible.\n\n{demo}{context}\n\nQuestion: {question}"
)


def first_answer(prediction: str, lead: str) -> str:
    """What follows ``lead`` in the prediction, or the prediction, up to the end of the line."""
    _, found, after = prediction.lower().partition(lead.lower())
    text = prediction[len(prediction) - len(after) :] if found else prediction.lstrip("\n")
    return text.split("\n")[0].strip()


def _key(random: Random) -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


@dataclass(frozen=True)
class JsonKv:
    """Find the value of one key among many, all of them random UUIDs."""

    seed: int
    name = "helmet_json_kv"
    family = "helmet"
    metric = "contains"

    def sample(self, index: int, length: int, encoder: Encoder) -> Sample:
        """See `Task.sample`; the key asked for lies anywhere, the keys of the examples too."""

        def build(size: int) -> Sample:
            random = dice(self.seed, self.name, length, index)
            depth = random.random()
            pairs = [(_key(random), _key(random)) for _ in range(size)]
            place = int(depth * size)
            others = random.sample([at for at in range(size) if at != place], SHOTS)
            demos = "".join(f"Key: {pairs[at][0]}\nCorresponding value: {pairs[at][1]}\n\n" for at in others)
            key, value = pairs[place]
            lines = (f'"{name}": "{found}"' for name, found in pairs)
            context = "JSON data:\n{" + ",\n ".join(lines) + "}"
            return Sample(_KV.format(context=context, demos=demos, key=key), "\nCorresponding value:", (value,), 50)

        return fit(build, length, encoder, least=SHOTS + 1, what=self.name)

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if the value is found, in the prediction or its first answer."""
        return best(contains, prediction, sample.references)


@dataclass(frozen=True)
class Published:
    """Questions of a published file; the context is cut in the middle when it is too long."""

    name: str
    metric: str
    rows: Callable[[], list[dict[str, Any]]]
    make: Callable[[dict[str, Any], str], Sample]
    context: Callable[[dict[str, Any]], str]
    lead: str
    rate: Metric
    family = "helmet"

    def sample(self, index: int, length: int, encoder: Encoder) -> Sample:
        """See `Task.sample`."""
        rows = self.rows()
        if index >= len(rows):
            raise ValueError(f"{self.name} has {len(rows)} questions, sample {index} was asked for")
        row = rows[index]
        text = self.context(row)
        return shorten(self.make(row, text), length, encoder, lambda cut: self.make(row, cut), text)

    def score(self, prediction: str, sample: Sample) -> float:
        """The better of the whole prediction and its first answer."""
        answers = (prediction, first_answer(prediction, self.lead))
        return max(best(self.rate, answer, sample.references) for answer in answers)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, or of a JSON file with its rows under ``data``."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)["data"]
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _documents(row: dict[str, Any]) -> str:
    return "\n\n".join(f"Document (Title: {found['title']}): {found['text']}" for found in row["ctxs"])


def _rag(name: str, path: Path, demos: Path) -> Published:
    @cache
    def rows() -> list[dict[str, Any]]:
        examples = read_jsonl(demos)
        found = read_jsonl(path)
        for row in found:
            # Which examples a question gets depends on the question alone.
            seed = hashlib.sha256(row["question"].encode()).hexdigest()
            others = [example for example in examples if example["question"] != row["question"]]
            chosen = dice(seed).sample(others, SHOTS)
            shown = (f"{_documents(c)}\n\nQuestion: {c['question']}\nAnswer: {c['answers'][0]}\n\n" for c in chosen)
            row["demos"] = "".join(shown)
        return found

    def make(row: dict[str, Any], context: str) -> Sample:
        prompt = _RAG.format(demos=row["demos"], context=context, question=row["question"])
        return Sample(prompt, "\nAnswer:", tuple(row["answers"]), 20)

    return Published(f"helmet_{name}", "contains", rows, make, _documents, "Answer:", contains)


def _narrativeqa(path: Path) -> Published:
    def make(row: dict[str, Any], context: str) -> Sample:
        prompt = _STORY.format(demo=row.get("demo", ""), context=context, question=row["question"])
        return Sample(prompt, "\nAnswer:", tuple(row["answer"]), 50)

    rows = cache(lambda: read_jsonl(path))
    return Published("helmet_narrativeqa", "f1", rows, make, lambda row: row["context"], "Answer:", f1)


def tasks(folder: Path | None, seed: int = 0) -> list[JsonKv | Published]:
    """JSON KV, and the sets whose files lie in ``folder``.

    Args:
        folder: with ``nq.jsonl`` and ``nq_demos.jsonl`` (rows with ``question``, ``answers``, ``ctxs`` of ``title`` and
            ``text``: HELMET's ``data/kilt``), and so on for `RAG`; ``narrativeqa.jsonl`` (``context``, ``question``,
            ``answer``, and ``demo`` if there are examples).
        seed: of the random keys.
    """
    found: list[JsonKv | Published] = [JsonKv(seed)]
    if folder is None:
        return found
    for name in RAG:
        path, demos = folder / f"{name}.jsonl", folder / f"{name}_demos.jsonl"
        if path.is_file() and demos.is_file():
            found.append(_rag(name, path, demos))
    if (story := folder / "narrativeqa.jsonl").is_file():
        found.append(_narrativeqa(story))
    return found
