"""Stand-ins for published files: the same form, made from a plain text, so that every loader and score can run offline.

Their questions are about the text that they were cut from. They say nothing about the published sets, and every place that
shows a figure from them says *stand-in*.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from thrift_lab.eval.tasks.base import dice, sentences

SETS = ("ruler/squad.json", "ruler/hotpot.json", "helmet/nq.jsonl", "helmet/nq_demos.jsonl", "helmet/narrativeqa.jsonl")
LONGBENCH = ("narrativeqa", "hotpotqa", "gov_report", "trec", "samsum", "passage_count", "passage_retrieval_en", "lcc")


def passages(text: str, words: int = 60) -> list[str]:
    """Runs of whole sentences of about so many words, without repeats."""
    found: list[str] = []
    current: list[str] = []
    for sentence in sentences(" ".join(text.split())):
        current += sentence.split()
        if len(current) >= words:
            found.append(" ".join(current[: 2 * words]))
            current = []
    return list(dict.fromkeys(found))


def cloze(passage: str) -> tuple[str, str]:
    """A question about a passage and its answer: the word that follows four others in its middle."""
    words = passage.split()
    at = len(words) // 2
    answer = re.sub(r"\W+$", "", words[at]) or words[at]
    return f'Which word follows "{" ".join(words[at - 4 : at])}"?', answer


def write(folder: Path, text: str, rows: int = 8, seed: int = 0) -> Path:
    """Write every set.

    Args:
        folder: where; made if need be. Holds ``ruler``, ``helmet`` and ``longbench`` afterwards.
        text: of 4,000 words or more.
        rows: questions in each set.
        seed: of every choice.

    Returns:
        The folder.

    Raises:
        ValueError: too short a text.
    """
    found = passages(text)
    if len(found) < 40:
        raise ValueError(f"stand-ins need a text of 40 passages of 60 words, got {len(found)}")
    random = dice(seed, "standin")

    def some(count: int) -> list[str]:
        return random.sample(found, min(count, len(found)))

    def qa(count: int) -> tuple[list[str], str, str]:
        chosen = some(count)
        return chosen, *cloze(random.choice(chosen))

    articles = []
    for _ in range(-(-rows // 4)):
        paragraphs = []
        for passage in some(4):
            query, answer = cloze(passage)
            entry = {"question": query, "answers": [{"text": answer}], "is_impossible": False}
            paragraphs.append({"context": passage, "qas": [entry]})
        articles.append({"paragraphs": paragraphs})
    hotpot: list[dict[str, Any]] = []
    kilt: list[dict[str, Any]] = []
    for _ in range(2 * rows):
        chosen, query, answer = qa(5)
        documents = [[f"Passage {i}", sentences(passage)] for i, passage in enumerate(chosen)]
        hotpot.append({"question": query, "answer": answer, "context": documents})
        contexts = [{"title": f"Passage {i}", "text": passage} for i, passage in enumerate(chosen)]
        kilt.append({"question": query, "answers": [answer], "ctxs": contexts})
    story = []
    for _ in range(rows):
        chosen, query, answer = qa(40)
        story.append({"context": "\n".join(chosen), "question": query, "answer": [answer]})
    files: dict[str, Any] = {
        "ruler/squad.json": {"data": articles},
        "ruler/hotpot.json": hotpot[:rows],
        "helmet/nq.jsonl": kilt[:rows],
        "helmet/nq_demos.jsonl": [{**row, "ctxs": row["ctxs"][:1]} for row in kilt[rows:]],
        "helmet/narrativeqa.jsonl": story,
    }
    for kind in LONGBENCH:
        files[f"longbench/{kind}.jsonl"] = [_longbench(kind, some, f"{kind}-{i}") for i in range(rows)]
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = content if name.endswith(".jsonl") else [content]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def _longbench(kind: str, some: Any, identity: str) -> dict[str, Any]:
    """One row of a LongBench file."""
    chosen: list[str] = some(30)
    pick = len(identity) * 7 + int(identity.rpartition("-")[2])  # some fixed place that differs from row to row
    classes: list[str] | None = None
    query, answer = cloze(chosen[pick % 30])
    context = "\n\n".join(f"Passage {i}:\n{passage}" for i, passage in enumerate(chosen, start=1))
    if kind == "gov_report":
        query, answer, context = "", " ".join(sentences(passage)[0] for passage in chosen[:3]), "\n\n".join(chosen)
    elif kind in ("trec", "samsum"):
        classes = ["Beginning of a passage", "End of a passage"] if kind == "trec" else None
        rows = [_labelled(kind, passage, i) for i, passage in enumerate(chosen)]
        context, (query, answer) = "\n".join(f"{given}{right}" for given, right in rows[:-1]), rows[-1]
    elif kind == "passage_count":
        kept = chosen[: 5 + pick % 5]
        doubled = kept + kept[: pick % 3 + 1]
        query, answer = "", str(len(kept))
        context = "\n\n".join(f"Paragraph {i}: {passage}" for i, passage in enumerate(doubled[::-1], start=1))
    elif kind == "passage_retrieval_en":
        context = "\n\n".join(f"Paragraph {i}: {passage}" for i, passage in enumerate(chosen, start=1))
        query, answer = sentences(chosen[pick % 30])[0], f"Paragraph {pick % 30 + 1}"
    elif kind == "lcc":
        lines = [f"value_{i} = {i} * {i + pick}" for i in range(60)]
        query, answer, context = "", lines[-1], "\n".join(lines[:-1]) + "\n"
    return {"_id": identity, "input": query, "context": context, "answers": [answer], "all_classes": classes}


def _labelled(kind: str, passage: str, at: int) -> tuple[str, str]:
    """An example and its label."""
    words = passage.split()
    if kind == "trec":
        part = words[:8] if at % 2 else words[-8:]
        return f"Question: {' '.join(part)}\nType: ", "Beginning of a passage" if at % 2 else "End of a passage"
    return f"Dialogue: {passage}\nSummary: ", " ".join(words[:8])
