"""Scores of one prediction against its references, all in [0, 1]."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from thrift_lab.extras import need

Metric = Callable[[str, str], float]


def best(metric: Metric, prediction: str, references: Sequence[str]) -> float:
    """The best score over several right answers; 0 without any."""
    return max((metric(prediction, reference) for reference in references), default=0.0)


def found_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the prediction, letter case aside. Source: RULER, string_match_all."""
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def found_any(prediction: str, references: Sequence[str]) -> float:
    """1 if any reference occurs in the prediction, letter case aside. Source: RULER, string_match_part."""
    text = prediction.lower()
    return float(any(reference.lower() in text for reference in references))


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and surplus spaces. Source: the SQuAD evaluation."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def contains(prediction: str, reference: str) -> float:
    """1 if the normalised reference occurs in the normalised prediction. Source: HELMET, substring exact match."""
    return float(normalised(reference) in normalised(prediction))


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over normalised words. Source: LongBench, qa_f1_score."""
    mine, right = normalised(prediction).split(), normalised(reference).split()
    same = sum((Counter(mine) & Counter(right)).values())
    return 2 * same / (len(mine) + len(right)) if same else 0.0


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words. Source: LongBench, through the package ``rouge``."""
    if not prediction.strip(" .\n\t") or not reference.strip(" .\n\t"):
        return 0.0  # the package refuses texts without a sentence
    return float(need("rouge").Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)[0]["rouge-l"]["f"])


def same_number(prediction: str, reference: str) -> float:
    """Share of the numbers in the prediction that equal the reference. Source: LongBench, count_score."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference.strip()) / len(numbers) if numbers else 0.0


def same_paragraph(prediction: str, reference: str) -> float:
    """As `same_number`, for the N of the reference ``Paragraph N``. Source: LongBench, retrieval_score."""
    wanted = re.search(r"Paragraph (\d+)", reference)
    if wanted is None:
        raise ValueError(f"expected a reference of the form 'Paragraph N', got {reference!r}")
    return same_number(prediction, wanted[1])


def code_similarity(prediction: str, reference: str) -> float:
    """Likeness of the first line that is code, in steps of 0.01. Source: LongBench, code_sim_score."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def same_class(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the prediction names, if the right one is among them; else 0.

    A class whose name is part of the right one does not count against it. Source: LongBench, classification_score.
    """
    named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0
