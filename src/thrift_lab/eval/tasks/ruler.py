"""The 13 tasks of RULER, made at any length for any tokenizer.

Source: RULER (arXiv 2404.06654), appendices A and B, and the definitions of its repository. Templates, answer lengths,
numbers of needles, chains and words are the published ones. What differs: sentences of the essay are found by a regular
expression, the essay is any text (RULER: essays by Paul Graham), and every sample has random numbers of its own.

lm-eval's `ruler` tasks are not used: they fetch the essays from paulgraham.com and GitHub, SQuAD and HotpotQA from the net
and NLTK's sentence splitter when they are built, always make 500 samples of each length, and take a tokenizer by name from
the hub, so they run neither offline nor for a model already loaded. `thrift eval harness` runs them with a net.
"""

from __future__ import annotations

import json
import math
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from thrift_lab.eval.tasks.base import Encoder, Sample, dice, fit, sentences
from thrift_lab.eval.tasks.metrics import found_all, found_any
from thrift_lab.extras import need

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Where needles may lie in an essay, in per cent."""

ZETA_2 = math.pi**2 / 6
SHORT = 4096
"""Below this many tokens the word lists are thinner."""

_NIAH = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text?"
)
_NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text {are}"
_TRACE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {value} in the text above."
)
_TRACE_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the value "
    "{value}, they are: "
)
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?"
)
_CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_QA = _ONLY + "\n\nThe following are given documents.\n\n{context}\n\n" + _ONLY + "\n\nQuestion: {query}"


@cache
def words(*kinds: str) -> tuple[str, ...]:
    """The word lists that RULER uses: ``noun``, ``adjective``, ``verb`` of the package ``wonderwords``."""
    folder = resources.files(need("wonderwords")) / "assets"
    lists = ((folder / f"{kind}list.txt").read_text(encoding="utf-8").split("\n") for kind in kinds)
    return tuple(sorted({word.strip() for found in lists for word in found} - {""}))


def thing(kind: str, random: Random) -> str:
    """A random key or value: ``numbers`` (7 digits), ``words`` (adjective-noun) or ``uuids``."""
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    if kind == "words":
        return f"{random.choice(words('adjective'))}-{random.choice(words('noun'))}"
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


@dataclass(frozen=True)
class _Ruler:
    """What all tasks share. A task is a row of `tasks`."""

    name: str
    seed: int
    family = "ruler"
    metric = "found"

    def build(self, size: int, random: Random, length: int, index: int) -> Sample:
        """A sample with ``size`` units of filling."""
        raise NotImplementedError

    def least(self, length: int) -> int:
        """Fewest units of filling."""
        return 1

    def most(self) -> int | None:
        """Most units of filling."""
        return None

    def sample(self, index: int, length: int, encoder: Encoder) -> Sample:
        """The largest sample of at most ``length`` tokens, see `Task.sample`."""

        def build(size: int) -> Sample:
            return self.build(size, dice(self.seed, self.name, length, index), length, index)

        return fit(build, length, encoder, least=self.least(length), most=self.most(), what=self.name)

    def score(self, prediction: str, sample: Sample) -> float:
        """Share of the references found in the prediction."""
        return found_all(prediction, sample.references)


@dataclass(frozen=True)
class Niah(_Ruler):
    """Needles in a haystack: ``keys`` keys with ``values`` values each, of which ``queries`` keys are asked for."""

    haystack: str  # noise, essay, needle
    key: str
    value: str
    keys: int = 1
    values: int = 1
    queries: int = 1
    essay: tuple[str, ...] = ()

    def least(self, length: int) -> int:
        return 1 if self.haystack == "essay" else max(self.keys, self.queries) * self.values

    def build(self, size: int, random: Random, length: int, index: int) -> Sample:
        pairs = [
            (thing(self.key, random), [thing(self.value, random) for _ in range(self.values)])
            for _ in range(max(self.keys, self.queries))
        ]
        asked = random.sample(pairs, self.queries)
        needles = [NEEDLE.format(kind=self.value, key=key, value=value) for key, found in pairs for value in found]
        random.shuffle(needles)
        names = [key for key, _ in asked]
        one = self.queries * self.values == 1
        words = {
            "kind": self.value[:-1] if one else self.value,
            "are": "is" if one else "are",
            "query": names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}",
        }
        context = self._hidden(needles, size, random)
        return Sample(
            _NIAH.format(some="A" if one else "Some", are_all="is" if one else "are all", context=context, **words),
            _NIAH_PREFIX.format(**words),
            tuple(value for _, found in asked for value in found),
            128,
            {"join": ", "},
        )

    def _hidden(self, needles: list[str], size: int, random: Random) -> str:
        """The haystack with the needles in it."""
        if self.haystack == "essay":
            repeats = -(-size // len(self.essay))
            filling = sentences(" ".join((self.essay * repeats)[:size]))
            depths = sorted(random.sample(DEPTHS, len(needles)), reverse=True)
            places = [len(filling) * depth // 100 for depth in depths]
            for place, needle in zip(places, needles, strict=True):
                filling.insert(place, needle)
            return " ".join(filling)
        filling = [NOISE] * size
        if self.haystack == "needle":
            filling = [
                NEEDLE.format(kind=self.value, key=thing(self.key, random), value=thing(self.value, random))
                for _ in range(size)
            ]
        for place, needle in zip(sorted(random.sample(range(size), len(needles)), reverse=True), needles, strict=True):
            filling.insert(place, needle)
        return "\n".join(filling)


@dataclass(frozen=True)
class Trace(_Ruler):
    """Variable tracking: one chain of ``hops`` assignments in noise, after an example of up to 500 tokens."""

    hops: int = 4

    def least(self, length: int) -> int:
        return self.hops + 1

    def sample(self, index: int, length: int, encoder: Encoder) -> Sample:
        def example(size: int) -> Sample:
            question, lead, names = self._chain(size, 3, dice(self.seed, self.name, length, index, "example"))
            return Sample(f"{question}{lead} {' '.join(names)}\n\n", "", names, 0)

        shown = fit(example, 500, encoder, least=self.least(500), what=f"the example of {self.name}").prompt

        def build(size: int) -> Sample:
            question, lead, names = self._chain(size, 5, dice(self.seed, self.name, length, index))
            return Sample(shown + question, lead, names, 30, {"join": " "})

        return fit(build, length, encoder, least=self.least(length), what=self.name)

    def _chain(self, size: int, letters: int, random: Random) -> tuple[str, str, tuple[str, ...]]:
        """Question, beginning of the answer, and the variables."""
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(random.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = str(random.randint(10000, 99998))
        chain = [f"VAR {names[0]} = {value}"] + [f"VAR {new} = VAR {old} " for old, new in pairwise(names)]
        lines = [NOISE] * size
        for at, place in enumerate(sorted(random.sample(range(size), len(chain)))):
            lines.insert(place + at, chain[at])
        question = _TRACE.format(context="\n".join(lines), value=value)
        return question, _TRACE_PREFIX.format(count=self.hops + 1, value=value), tuple(names)


@dataclass(frozen=True)
class CommonWords(_Ruler):
    """Ten words that a list repeats more often than the others, after a short example."""

    def least(self, length: int) -> int:
        return 11

    def most(self) -> int | None:
        return len(words("noun", "adjective", "verb"))

    def build(self, size: int, random: Random, length: int, index: int) -> Sample:
        short = length < SHORT
        example, common = self._list(*((20, 3, 1) if short else (40, 10, 3)), random)
        context, answer = self._list(size, *((6, 1) if short else (30, 3)), random)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(common, start=1))
        shown = f"{_COMMON.format(context=example)}{_COMMON_PREFIX} {numbered}\n"
        extra = {"join": " "}
        return Sample(shown + _COMMON.format(context=context), _COMMON_PREFIX, answer, 120, extra)

    @staticmethod
    def _list(size: int, often: int, seldom: int, random: Random) -> tuple[str, tuple[str, ...]]:
        """The numbered list and its ten common words."""
        chosen = random.sample(words("noun", "adjective", "verb"), size)
        entries = chosen[:10] * often + chosen[10:] * seldom
        random.shuffle(entries)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1)), tuple(chosen[:10])


@dataclass(frozen=True)
class FrequentWords(_Ruler):
    """The three most frequent coded words. Numbers fall with the square of the rank (zeta, alpha 2); rank 1 is dots."""

    def least(self, length: int) -> int:
        return 60  # the fourth word occurs at least twice

    def build(self, size: int, random: Random, length: int, index: int) -> Sample:
        names: list[str] = []
        while len(names) < max(10, (length - 50) // 50):
            name = "".join(random.choices(string.ascii_lowercase, k=6))
            names += [name] if name not in names else []
        names[0] = "..."
        text = [name for k, name in enumerate(names, start=1) for _ in range(int(size / (k * k) / ZETA_2))]
        random.shuffle(text)
        return Sample(_CODED.format(context=" ".join(text)), _CODED_PREFIX, tuple(names[1:4]), 50, {"join": " "})


@dataclass(frozen=True)
class Question:
    """A question about documents that are part of a larger set."""

    query: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions(_Ruler):
    """A question whose documents lie among many others."""

    load: Callable[[], tuple[list[Question], list[str]]]

    def least(self, length: int) -> int:
        return 1

    def build(self, size: int, random: Random, length: int, index: int) -> Sample:
        questions, documents = self.load()
        if index >= len(questions):
            raise ValueError(f"{self.name} has {len(questions)} questions, sample {index} was asked for")
        question = questions[index]
        chosen, related = list(question.documents), list(question.related)
        if size - len(chosen) <= len(related):
            chosen += random.sample(related, max(0, size - len(chosen)))
        else:
            chosen += related
            others = [i for i in range(len(documents)) if i not in {*chosen}] or list(range(len(documents)))
            while len(chosen) < size:
                chosen += random.sample(others, min(size - len(chosen), len(others)))
        random.shuffle(chosen)
        context = "\n\n".join(f"Document {i}:\n{documents[at]}" for i, at in enumerate(chosen, start=1))
        return Sample(_QA.format(context=context, query=question.query), " Answer:", question.answers, 32)

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if any answer is found in the prediction."""
        return found_any(prediction, sample.references)


def read_squad(path: Path) -> tuple[list[Question], list[str]]:
    """Questions and paragraphs of a SQuAD 2.0 file (RULER qa_1: ``dev-v2.0.json``); unanswerable questions are left out."""
    data: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["data"]
    documents = sorted({paragraph["context"] for article in data for paragraph in article["paragraphs"]})
    at = {document: i for i, document in enumerate(documents)}
    questions: list[Question] = []
    for article in data:
        here = [at[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph, own in zip(article["paragraphs"], here, strict=True):
            related = tuple(i for i in dict.fromkeys(here) if i != own)
            for entry in paragraph["qas"]:
                if not entry.get("is_impossible", False):
                    answers = tuple(answer["text"] for answer in entry["answers"])
                    questions.append(Question(entry["question"], answers, (own,), related))
    return questions, documents


def read_hotpot(path: Path) -> tuple[list[Question], list[str]]:
    """Questions and paragraphs of a HotpotQA file (RULER qa_2: ``hotpot_dev_distractor_v1.json``)."""
    data: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    texts = [[f"{title}\n{''.join(lines)}" for title, lines in entry["context"]] for entry in data]
    documents = sorted({text for found in texts for text in found})
    at = {document: i for i, document in enumerate(documents)}
    questions = [
        Question(entry["question"], (entry["answer"],), tuple(at[text] for text in found))
        for entry, found in zip(data, texts, strict=True)
    ]
    return questions, documents


def tasks(essay: str, squad: Path | None, hotpot: Path | None, seed: int = 0) -> list[_Ruler]:
    """The tasks in the order of the paper; the two QA tasks only with their files.

    Args:
        essay: text of the haystack.
        squad: file of `read_squad`.
        hotpot: file of `read_hotpot`.
        seed: of every random choice.
    """
    text = tuple(essay.split())

    def niah(name: str, haystack: str, value: str = "numbers", **options: Any) -> Niah:
        own = text if haystack == "essay" else ()
        return Niah(f"ruler_niah_{name}", seed, haystack, options.pop("key", "words"), value, essay=own, **options)

    found: list[_Ruler] = [
        niah("single_1", "noise"),
        niah("single_2", "essay"),
        niah("single_3", "essay", "uuids"),
        niah("multikey_1", "essay", keys=4),
        niah("multikey_2", "needle"),
        niah("multikey_3", "needle", "uuids", key="uuids"),
        niah("multivalue", "essay", values=4),
        niah("multiquery", "essay", queries=4),
        Trace("ruler_vt", seed),
        CommonWords("ruler_cwe", seed),
        FrequentWords("ruler_fwe", seed),
    ]
    if squad is not None:
        found.append(Questions("ruler_qa_1", seed, cache(lambda: read_squad(squad))))
    if hotpot is not None:
        found.append(Questions("ruler_qa_2", seed, cache(lambda: read_hotpot(hotpot))))
    return found
