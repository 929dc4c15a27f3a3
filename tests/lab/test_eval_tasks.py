"""Tasks against hand-worked examples, and their scores."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from thrift_lab.eval.tasks import longbench, metrics, ruler, standin
from thrift_lab.eval.tasks.base import Encoder, Sample, dice, fit, sentences, shorten
from thrift_lab.eval.tasks.helmet import JsonKv, first_answer
from thrift_lab.eval.tasks.table import NEEDED, Table, table
from thrift_lab.extras import MissingExtra

ESSAY = " ".join(f"Sentence {n} speaks of the {n}th thing." for n in range(3000))
SINGLE_1 = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number "
    "afterwards.\n"
)


class Words:
    """A tokenizer whose tokens are words and line ends; the chat template is one word in front and one behind."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:
        pieces = re.findall(r"\n|[^\s]+", text)
        return {"input_ids": ([0] if add_special_tokens else []) + [1 + hash(piece) % 1000 for piece in pieces]}

    def apply_chat_template(self, turns: list[dict[str, str]], **options: Any) -> str:
        assert options == {"add_generation_prompt": True, "tokenize": False}
        return f"<user> {turns[0]['content']} <assistant> "


ENCODER = Encoder(Words())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = " ".join(
        f"The {n}th house of {n * n % 97} on hill {n % 13} has {n * 7 % 101} doors and no windows." for n in range(700)
    )
    return standin.write(tmp_path_factory.mktemp("data"), text)


@pytest.fixture(scope="module")
def tasks(folder: Path) -> Table:
    return table(ESSAY, folder)


# -- scores -----------------------------------------------------------------------------------------------------------


def test_string_match() -> None:
    assert metrics.found_all("The numbers are 12 and 345.", ["12", "345", "99"]) == pytest.approx(2 / 3)
    assert metrics.found_all("ALPHA beta", ["alpha", "Beta"]) == 1
    assert metrics.found_any("it was France.", ["Germany", "france"]) == 1
    assert metrics.found_any("it was Spain.", ["Germany", "France"]) == 0


def test_normalised_words() -> None:
    assert metrics.normalised(" The  Cat, an old-one; a DOG! ") == "cat oldone dog"
    assert metrics.contains("It is the Eiffel tower, I think", "The Eiffel Tower") == 1
    assert metrics.contains("Eiffel", "The Eiffel Tower") == 0
    # mine: "cat sat on mat", right: "cat on mat": 3 in common of 4 and 3, so 2 * 3 / 7
    assert metrics.f1("The cat sat on the mat.", "a cat on the mat") == pytest.approx(6 / 7)
    assert metrics.f1("dog", "cat") == 0
    assert metrics.best(metrics.f1, "cat", ["dog", "the cat"]) == 1
    assert metrics.best(metrics.f1, "cat", []) == 0


def test_longbench_scores() -> None:
    assert metrics.same_number("There are 3, or 4, or 3.", "3") == pytest.approx(2 / 3)
    assert metrics.same_number("none", "3") == 0
    assert metrics.same_paragraph("Paragraph 12", "Paragraph 12") == 1
    assert metrics.same_paragraph("12 or 13", "Paragraph 12") == 0.5
    with pytest.raises(ValueError, match="of the form 'Paragraph N', got 'twelve'"):
        metrics.same_paragraph("12", "twelve")
    assert metrics.code_similarity("```python\n# comment\nx = 1\ny = 2", "x = 1") == 1
    assert metrics.code_similarity("abcd", "abce") == 0.75  # 2 * 3 letters in common of 8
    classes = ["Number", "Number of something", "Date"]
    assert metrics.same_class("It is a Date", "Date", classes) == 1
    assert metrics.same_class("Date or Number", "Date", classes) == 0.5
    # "Number" is part of the right class and does not count against it
    assert metrics.same_class("Number of something", "Number of something", classes) == 1
    assert metrics.same_class("Number of something", "Number", classes) == 0.5
    assert metrics.same_class("nothing", "Date", classes) == 0


def test_rouge_l_of_a_hand_worked_pair() -> None:
    # longest common subsequence "the cat mat": 3 of 4 words and 3 of 5
    precision, recall = 3 / 4, 3 / 5
    assert metrics.rouge_l("the cat mat sat", "the cat on a mat") == pytest.approx(
        2 * precision * recall / (precision + recall), abs=1e-6
    )
    assert metrics.rouge_l("...", "the cat") == metrics.rouge_l("the cat", "") == 0


def test_first_answer() -> None:
    assert first_answer("Corresponding value: abc\nKey: x", "corresponding value:") == "abc"
    assert first_answer("\n\nabc d\nmore", "answer:") == "abc d"


# -- samples ----------------------------------------------------------------------------------------------------------


def test_sentences() -> None:
    assert sentences('He came. "Why?" she asked! J. Smith left.') == [
        "He came.",
        '"Why?"',
        "she asked!",
        "J. Smith left.",
    ]


def test_fit_and_shorten() -> None:
    def build(size: int) -> Sample:
        return Sample("w " * size, "", ("x",), 5)

    assert len(fit(build, 100, ENCODER, least=1, what="w").prompt.split()) == 100 - 5 - 1  # the tokenizer adds one
    with pytest.raises(ValueError, match="w needs at least 26 tokens with its answer, got a length of 20"):
        fit(build, 20, ENCODER, least=20, what="w")
    with pytest.raises(ValueError, match="w has too little material for a length of 100: it ends at 46"):
        fit(build, 100, ENCODER, least=1, what="w", most=40)

    def make(text: str) -> Sample:
        return Sample(f"Q {text} A", "", ("x",), 5)

    text = " ".join(map(str, range(1000)))
    short = shorten(make(text), 60, ENCODER, make, text)
    assert 50 <= ENCODER.size(short) <= 60
    assert short.prompt.startswith("Q 0 1 2")
    assert short.prompt.endswith("998 999 A")
    assert shorten(make("a b"), 60, ENCODER, make, "a b") == make("a b")
    with pytest.raises(ValueError, match="the question alone has more than 5 tokens"):
        shorten(make(text), 5, ENCODER, make, text)


def test_chat() -> None:
    sample = Sample("one two", " three", ("x",), 5)
    assert len(ENCODER.ids(sample)) == 4
    assert len(Encoder(Words(), chat=True).ids(sample)) == 5  # the template brings what it needs


def test_every_task_fits_scores_its_own_answer_and_repeats(tasks: Table) -> None:
    assert sum(name.startswith("ruler_") for name in tasks.tasks) == 13
    for task in tasks.tasks.values():
        sample = task.sample(1, 900, ENCODER)
        assert ENCODER.size(sample) <= 900, task.name
        if task.family == "ruler" or task.name == "helmet_json_kv":
            assert ENCODER.size(sample) > 750, task.name  # it fills the length
        assert task.score(sample.gold, sample) == pytest.approx(1, abs=1e-6), task.name
        assert task.score("", sample) == 0, task.name
        assert task.sample(1, 900, ENCODER) == sample, task.name
        assert task.sample(0, 900, ENCODER) != sample, task.name


def niah(tasks: Table, name: str, length: int = 400) -> Sample:
    return tasks.tasks[f"ruler_niah_{name}"].sample(0, length, ENCODER)


def test_niah_single_1(tasks: Table) -> None:
    sample = niah(tasks, "single_1")
    assert sample.prompt.startswith(SINGLE_1)
    lines = sample.prompt.removeprefix(SINGLE_1).split("\n")
    needle = next(line for line in lines if line != ruler.NOISE)
    key, value = re.fullmatch(r"One of the special magic numbers for (\w+-\S+) is: (\d{7})\.", needle).groups()
    assert lines[-1] == f"What is the special magic number for {key} mentioned in the provided text?"
    assert set(lines) == {ruler.NOISE, needle, lines[-1]}
    assert sample.prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert sample.references == (value,)
    assert sample.gold == f" {value}"
    assert sample.max_new == 128


@pytest.mark.parametrize(
    ("name", "needles", "answers", "key", "value"),
    [
        ("single_2", 1, 1, r"[\w-]+", r"\d{7}"),
        ("single_3", 1, 1, r"[\w-]+", r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("multikey_1", 4, 1, r"[\w-]+", r"\d{7}"),
        ("multivalue", 4, 4, r"[\w-]+", r"\d{7}"),
        ("multiquery", 4, 4, r"[\w-]+", r"\d{7}"),
    ],
)
def test_niah_in_an_essay(tasks: Table, name: str, needles: int, answers: int, key: str, value: str) -> None:
    sample = niah(tasks, name)
    kind = "uuids" if name == "single_3" else "numbers"
    found = re.findall(rf"One of the special magic {kind} for ({key}) is: ({value})\.", sample.prompt)
    assert len(found) == needles
    assert len({key for key, _ in found}) == (1 if name == "multivalue" else needles)
    assert len(sample.references) == answers
    assert set(sample.references) <= {value for _, value in found}
    question = sample.prompt.rpartition("\n")[2]
    assert question.startswith(
        "What are all the special magic numbers for" if answers > 1 else "What is the special magic"
    )
    if name == "multiquery":
        asked = question.removeprefix("What are all the special magic numbers for ").partition(" mentioned")[0]
        names = asked.replace(", and ", ", ").split(", ")
        assert [dict(found)[name] for name in names] == list(sample.references)
    rest = re.sub(rf" ?One of the special magic {kind} for {key} is: {value}\.", "", sample.prompt)
    assert (
        "Sentence 0 speaks of the 0th thing. Sentence 1 speaks" in rest
    )  # the essay is whole once the needles are out


@pytest.mark.parametrize(("name", "kind"), [("multikey_2", "numbers"), ("multikey_3", "uuids")])
def test_niah_among_needles(tasks: Table, name: str, kind: str) -> None:
    sample = niah(tasks, name)
    lines = sample.prompt.split("\n")[1:-1]
    found = [re.fullmatch(rf"One of the special magic {kind} for (\S+) is: (\S+)\.", line).groups() for line in lines]
    assert len(found) > 10
    asked = re.search(r"for (\S+) mentioned", sample.prompt.split("\n")[-1])[1]
    assert [value for key, value in found if key == asked] == list(sample.references)


def test_variable_tracking(tasks: Table) -> None:
    sample = tasks.tasks["ruler_vt"].sample(3, 1200, ENCODER)
    example, _, question = sample.prompt.partition("\n\nMemorize")
    value = re.search(r"assigned the value (\d{5}) in the text above\.$", question)[1]
    chain = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR ([A-Z]{5}) |(\d{5}))$", question, flags=re.MULTILINE)
    assert [name for name, _, _ in chain] == list(sample.references)
    assert [before for _, before, _ in chain] == ["", *sample.references[:-1]]
    assert chain[0][2] == value
    assert sample.prefix.endswith(f"5 variables are assigned the value {value}, they are: ")
    shown = re.findall(r"^VAR ([A-Z]{3}) = ", example, flags=re.MULTILINE)
    assert example.endswith(" ".join(shown))
    assert len(shown) == 5
    assert 400 < len(Words()(example)["input_ids"]) <= 500


@pytest.mark.parametrize(("length", "often", "seldom", "shown"), [(2000, 6, 1, (3, 1)), (6000, 30, 3, (10, 3))])
def test_common_words(tasks: Table, length: int, often: int, seldom: int, shown: tuple[int, int]) -> None:
    sample = tasks.tasks["ruler_cwe"].sample(0, length, ENCODER)
    first, second = sample.prompt.split("\nBelow is a numbered list")
    for text, (high, low) in ((first, shown), (second, (often, seldom))):
        words = re.findall(r"\d+\. (\S+)", text.partition("\nQuestion")[0].split("most often.\n")[1])
        counts = Counter(words)
        assert set(counts.values()) == {high, low}
        common = {word for word, count in counts.items() if count == high}
        assert len(common) == 10
        if text is second:
            assert common == set(sample.references)


def test_frequent_words(tasks: Table) -> None:
    sample = tasks.tasks["ruler_fwe"].sample(0, 3000, ENCODER)
    coded = re.search(r"coded words\. (.*)\nQuestion", sample.prompt)[1].split()
    counts = Counter(coded)
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[0] == "..."
    assert set(ranked[1:4]) == set(sample.references)
    assert all(re.fullmatch(r"[a-z]{6}", word) for word in ranked[1:])
    size = counts["..."] * ruler.ZETA_2  # numbers fall with the square of the rank
    for rank, word in enumerate(ranked[:6], start=1):
        assert abs(counts[word] - size / rank**2 / ruler.ZETA_2) <= 1


def test_questions(folder: Path, tmp_path: Path) -> None:
    squad = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "Rome is old.",
                        "qas": [{"question": "Is Rome old?", "answers": [{"text": "yes"}, {"text": "old"}]}],
                    },
                    {
                        "context": "Paris is in France.",
                        "qas": [{"question": "Where?", "answers": [], "is_impossible": True}],
                    },
                ]
            },
            {"paragraphs": [{"context": "Bread is food.", "qas": []}]},
        ]
    }
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(squad))
    questions, documents = ruler.read_squad(path)
    assert documents == ["Bread is food.", "Paris is in France.", "Rome is old."]
    assert questions == [ruler.Question("Is Rome old?", ("yes", "old"), (2,), (1,))]
    task = ruler.Questions("ruler_qa_1", 0, lambda: (questions, documents))
    sample = task.build(3, dice(0), 100, 0)
    assert sorted(re.findall(r"Document \d:\n(.*)", sample.prompt)) == documents
    assert sample.prompt.endswith("\n\nQuestion: Is Rome old?")
    assert task.score("I say: OLD", sample) == 1
    two = task.build(2, dice(0), 100, 0).prompt  # paragraphs of the same article come first
    assert "Rome is old." in two
    assert "Paris is in France." in two
    assert task.build(9, dice(0), 100, 0).prompt.count("Document ") == 9  # few documents repeat
    with pytest.raises(ValueError, match="ruler_qa_1 has 1 questions, sample 1 was asked for"):
        task.build(3, dice(0), 100, 1)
    hotpot = [{"question": "Who?", "answer": "Ann", "context": [["T", ["Ann ", "won."]], ["S", ["No."]]]}]
    path.write_text(json.dumps(hotpot))
    assert ruler.read_hotpot(path) == ([ruler.Question("Who?", ("Ann",), (1, 0))], ["S\nNo.", "T\nAnn won."])


def test_json_kv() -> None:
    sample = JsonKv(0).sample(0, 500, ENCODER)
    pairs = json.loads(sample.prompt.partition("JSON data:\n")[2].partition("\n\n")[0])
    asked = sample.prompt.rpartition("Key: ")[2]
    assert sample.references == (pairs[asked],)
    shown = re.findall(r"Key: (\S+)\nCorresponding value: (\S+)", sample.prompt)
    assert len(shown) == 2
    assert all(pairs[key] == value and key != asked for key, value in shown)
    assert len(pairs) > 100
    depths = []
    for index in range(20):
        one = JsonKv(0).sample(index, 200, ENCODER)
        keys = list(json.loads(one.prompt.partition("JSON data:\n")[2].partition("\n\n")[0]))
        depths.append(keys.index(one.prompt.rpartition("Key: ")[2]) / len(keys))
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_rag_and_narrativeqa(tasks: Table, folder: Path) -> None:
    sample = tasks.tasks["helmet_nq"].sample(0, 4000, ENCODER)
    row = json.loads((folder / "helmet/nq.jsonl").read_text().splitlines()[0])
    assert sample.prompt.startswith("Use the given documents to write a concise and short answer to the question.")
    assert sample.prompt.count("\n\nQuestion: ") == 3  # two examples and the question
    assert f"Document (Title: {row['ctxs'][0]['title']}): {row['ctxs'][0]['text']}" in sample.prompt
    assert sample.prompt.endswith(f"Question: {row['question']}")
    assert sample.prefix == "\nAnswer:"
    story = tasks.tasks["helmet_narrativeqa"]
    assert story.metric == "f1"
    with pytest.raises(ValueError, match="helmet_narrativeqa has 8 questions, sample 8 was asked for"):
        story.sample(8, 4000, ENCODER)


def test_longbench_rows(tasks: Table, folder: Path) -> None:
    assert len(longbench.TABLE) == 16
    assert "longbench_qasper" in tasks.lacking
    rows = [json.loads(line) for line in (folder / "longbench/trec.jsonl").read_text().splitlines()]
    sample = tasks.tasks["longbench_trec"].sample(0, 4000, ENCODER)
    assert sample.prompt == (
        "Please determine the type of the question below. Here are some examples of questions.\n\n"
        f"{rows[0]['context']}\n{rows[0]['input']}"
    )
    right, wrong = rows[0]["answers"][0], next(c for c in rows[0]["all_classes"] if c not in rows[0]["answers"])
    score = tasks.tasks["longbench_trec"].score
    assert score(f"\n{right}\nQuestion: {wrong}", sample) == 1  # only the first line counts
    assert score(f"{right} {wrong}", sample) == 0.5
    for kind, about in longbench.TABLE.items():
        filled = about.prompt.format(context="CONTEXT", input="INPUT")
        assert "CONTEXT" in filled, kind
        assert ("INPUT" in filled) == (kind not in ("gov_report", "multi_news", "passage_count", "lcc")), kind
        assert "{" not in filled, kind


def test_longbench_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import zipfile

    row = {"input": "", "context": "a = 1\n", "answers": ["b = 2"], "all_classes": None, "_id": "x"}
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("data/lcc.jsonl", json.dumps(row) + "\n")

    class Hub:
        @staticmethod
        def hf_hub_download(name: str, file: str, repo_type: str) -> str:
            assert (name, file, repo_type) == ("THUDM/LongBench", "data.zip", "dataset")
            if not archive.exists():
                raise RuntimeError("offline")
            return str(archive)

    monkeypatch.setattr(longbench, "need", lambda module, extra: Hub)
    found = {task.name: task for task in longbench.tasks(None, hub=True)}
    assert len(found) == 16
    assert found["longbench_lcc"].sample(0, 500, ENCODER).prompt.endswith("a = 1\nNext line of code:\n")
    archive.unlink()
    with pytest.raises(
        ValueError, match=r"could not read LongBench \(THUDM/LongBench\) .* offline. Offline, .* --data DIR"
    ):
        longbench.tasks(None, hub=True)[0].sample(0, 500, ENCODER)

    def refuse(module: str, extra: str) -> None:
        raise MissingExtra(f"pip install 'thrift-attn[{extra}]'")

    monkeypatch.setattr(longbench, "need", refuse)
    with pytest.raises(MissingExtra, match=r"thrift-attn\[hub\]"):
        longbench.tasks(None, hub=True)


def test_choosing(tasks: Table, tmp_path: Path) -> None:
    assert {task.family for task in tasks.choose("all")} == {"ruler", "helmet", "longbench"}
    assert [task.name for task in tasks.choose("ruler_vt, helmet,ruler_vt")][:2] == ["ruler_vt", "helmet_json_kv"]
    bare = table(ESSAY)
    assert len(bare.tasks) == 12  # RULER without its two QA tasks, and JSON KV
    assert set(bare.lacking) == set(NEEDED)
    assert bare.left_out("all") == bare.lacking
    assert set(bare.left_out("ruler, helmet_json_kv")) == {"ruler_qa_1", "ruler_qa_2"}
    with pytest.raises(ValueError, match=r"task ruler_qa_1 needs ruler/squad.json \(SQuAD 2.0"):
        bare.choose("ruler_qa_1")
    with pytest.raises(
        ValueError, match="unknown task 'niah': there are all, ruler, helmet, longbench, ruler_niah_single_1"
    ):
        bare.choose("niah")
    with pytest.raises(FileNotFoundError, match="with the data of the tasks"):
        table(ESSAY, tmp_path / "gone")


def test_too_little_of_something(tasks: Table, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ruler_niah_single_1 needs at least"):
        niah(tasks, "single_1", 100)
    with pytest.raises(ValueError, match="ruler_cwe has too little material for a length of 200000"):
        tasks.tasks["ruler_cwe"].sample(0, 200_000, ENCODER)
    with pytest.raises(ValueError, match="stand-ins need a text of 40 passages of 60 words, got 1"):
        standin.write(tmp_path, "One sentence here. " * 30)
