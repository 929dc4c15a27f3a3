"""The English tasks of LongBench, from its published files.

Source: LongBench v1 (arXiv 2308.14508) and its repository: prompts, answer lengths and scores as published. Rows have
``input``, ``context``, ``answers``, ``all_classes`` and ``_id``.

lm-eval's `longbench` tasks are not used: they read their rows from the hub when they are built, their module of scores needs
jieba and fuzzywuzzy for the Chinese tasks, and they leave out the cut in the middle that the published evaluation makes of
prompts longer than the context. `thrift eval harness` runs them where there is a net.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from thrift_lab.eval.tasks import metrics
from thrift_lab.eval.tasks.base import Encoder, Sample, shorten
from thrift_lab.eval.tasks.helmet import read_jsonl
from thrift_lab.eval.tasks.metrics import best
from thrift_lab.extras import need

HUB = ("THUDM/LongBench", "data.zip")

_ONLY = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
_PASSAGES = _ONLY + "\n\nThe following are given passages.\n{context}\n\n" + _ONLY + "\n\nQuestion: {input}\nAnswer:"
_CONCISE = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
_UNANSWERABLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the "
    'information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
    '"unanswerable". Do not provide any explanation.'
)


@dataclass(frozen=True)
class _Row:
    """One task: prompt, longest answer, score, and whether only the first line of a prediction counts."""

    prompt: str
    max_new: int
    metric: str
    first_line: bool = False


TABLE: dict[str, _Row] = {
    "narrativeqa": _Row(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"{_CONCISE}\n\nStory: {{context}}\n\nNow, answer the question based on the story {_CONCISE}\n\n"
        "Question: {input}\n\nAnswer:",
        128,
        "f1",
    ),
    "qasper": _Row(
        f"You are given a scientific article and a question. Answer the question {_UNANSWERABLE}\n\nArticle: {{context}}\n\n "
        f"Answer the question based on the above article {_UNANSWERABLE}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
        "f1",
    ),
    "multifieldqa_en": _Row(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above "
        "text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        "f1",
    ),
    "hotpotqa": _Row(_PASSAGES, 32, "f1"),
    "2wikimqa": _Row(_PASSAGES, 32, "f1"),
    "musique": _Row(_PASSAGES, 32, "f1"),
    "gov_report": _Row(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\nNow, "
        "write a one-page summary of the report.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "qmsum": _Row(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more "
        "sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more "
        "sentences.\n\nQuery: {input}\nAnswer:",
        512,
        "rouge_l",
    ),
    "multi_news": _Row(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write a "
        "one-page summary of all the news.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "trec": _Row(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        "same_class",
        True,
    ),
    "triviaqa": _Row(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The "
        "following are some examples.\n\n{context}\n\n{input}",
        32,
        "f1",
        True,
    ),
    "samsum": _Row(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        "rouge_l",
        True,
    ),
    "passage_count": _Row(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these "
        "paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how many "
        "non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after "
        "removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so on.\n\nThe final "
        "answer is: ",
        32,
        "same_number",
    ),
    "passage_retrieval_en": _Row(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is "
        "from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the "
        'abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        "same_paragraph",
    ),
    "lcc": _Row("Please complete the code given below. \n{context}Next line of code:\n", 64, "code_similarity"),
    "repobench-p": _Row(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", 64, "code_similarity"
    ),
}
"""The 16 English tasks in the order of the paper."""


@dataclass(frozen=True)
class LongBench:
    """One row of `TABLE` over the rows of its file."""

    kind: str
    rows: Callable[[], list[dict[str, Any]]]
    family = "longbench"

    @property
    def name(self) -> str:
        """``longbench_`` and the published name."""
        return f"longbench_{self.kind}"

    @property
    def metric(self) -> str:
        """Name of the published score."""
        return TABLE[self.kind].metric

    def sample(self, index: int, length: int, encoder: Encoder) -> Sample:
        """See `Task.sample`; a context that is too long is cut in the middle."""
        rows = self.rows()
        if index >= len(rows):
            raise ValueError(f"{self.name} has {len(rows)} questions, sample {index} was asked for")
        row, about = rows[index], TABLE[self.kind]
        extra = {"classes": row["all_classes"]} if row.get("all_classes") else {}

        def make(context: str) -> Sample:
            prompt = about.prompt.format(input=row["input"], context=context)
            return Sample(prompt, "", tuple(row["answers"]), about.max_new, extra)

        return shorten(make(row["context"]), length, encoder, make, row["context"])

    def score(self, prediction: str, sample: Sample) -> float:
        """The published score, the best over the references."""
        if TABLE[self.kind].first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        if self.metric == "same_class":
            classes = sample.extra["classes"]
            return best(lambda mine, right: metrics.same_class(mine, right, classes), prediction, sample.references)
        return best(getattr(metrics, self.metric), prediction, sample.references)


def from_hub() -> Callable[[str], list[dict[str, Any]]]:
    """Rows of the published archive, fetched through the hub client when first asked for.

    Raises:
        MissingExtra: huggingface_hub is not installed.
    """
    hub = need("huggingface_hub", "hub")

    @cache
    def archive() -> bytes:
        try:
            return Path(hub.hf_hub_download(HUB[0], HUB[1], repo_type="dataset")).read_bytes()
        except Exception as error:  # the hub client has no common base class for offline, missing and gated
            raise ValueError(
                f"could not read LongBench ({HUB[0]}) from the hub: {type(error).__name__}: {error}. "
                "Offline, give a folder with its files: --data DIR"
            ) from error

    def rows(kind: str) -> list[dict[str, Any]]:
        with zipfile.ZipFile(io.BytesIO(archive())) as zipped:
            return [json.loads(line) for line in zipped.read(f"data/{kind}.jsonl").decode().splitlines() if line]

    return rows


def tasks(folder: Path | None, hub: bool = False) -> list[LongBench]:
    """The tasks whose files (``NAME.jsonl``) lie in ``folder``; with ``hub`` all 16, read from the hub.

    Raises:
        MissingExtra: ``hub`` without the hub's client.
    """
    if hub:
        read = from_hub()
        return [LongBench(kind, cache(lambda kind=kind: read(kind))) for kind in TABLE]
    files = {} if folder is None else {kind: folder / f"{kind}.jsonl" for kind in TABLE}
    return [
        LongBench(kind, cache(lambda path=path: read_jsonl(path))) for kind, path in files.items() if path.is_file()
    ]
