"""The record of ``make test-gpu`` is green and speaks for today's kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

import thrift_attn
from thrift_lab.gpu_tests import GPUTestRecord, Mailbox, digest_of_kernels, join
from thrift_lab.provenance import digest_of_sources
from thrift_lab.run_tests import Step

ROOT = Path(__file__).parents[2]
PACKAGE = Path(thrift_attn.__file__).parent


def test_the_record_speaks_for_these_kernels() -> None:
    path = ROOT / "benchmarks/results/gpu-tests.json"
    assert path.exists(), "run make test-gpu on a GPU"
    record = GPUTestRecord.load(path)
    assert digest_of_kernels(PACKAGE) == record.sources, "kernels have changed since: run make test-gpu on a GPU"
    for step in record.steps:
        assert step.passed > 0, step.name
        assert set(step.problems) == set(step.mended), step.name
        assert step.failed == len(step.mended), step.name


def test_a_digest_is_of_what_sources_do(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()

    def digest(text: str) -> str:
        (room / "x.py").write_text(text)
        return digest_of_sources(tmp_path, ["room"])

    plain = digest("def f(x):\n    return x + 1\n")
    assert (
        digest(
            '"""Said."""\n\nfrom a import (\n    b,\n)\n\n\ndef f(x):\n    """Says\n    more."""\n    # why\n    return x + 1\n'
        )
        == plain
    )
    assert digest("def f(x):\n    return x + 2\n") != plain
    assert digest("def f(x):\n    return x + 1  # why\n") == plain
    different = [
        'def f(x):\n    y = """kept"""\n    return x + 1\n',
        "def f(x):\n    if x:\n        g(x)\n        h(x)\n",
        "def f(x):\n    if x:\n        g(x)\n    h(x)\n",
        "import os; LIMIT = 4\n",
        "import os; LIMIT = 8\n",
        'X = """a\n# no comment\n"""\n',
        'X = """a\n# none either\n"""\n',
        "if X:\n    from a import f\n",
        "if not X:\n    from a import f\n",
    ]
    assert len({plain, *map(digest, different)}) == 1 + len(different)


REPORT = "========= Error: Race reported between Read access at {}\n=========  and Write access at {} hazard\n"
SUMMARY = "========= RACECHECK SUMMARY: 2 hazards displayed\n"


def test_only_the_mailbox_of_warp_specialisation_is_accepted() -> None:
    mailbox = Mailbox.of(PACKAGE / "prefill/sm90_fp8/kernel.py")
    a, b = sorted(mailbox.lines)
    known = REPORT.format(f"/x/kernel.py:{a}", f"/x/kernel.py:{b}")
    assert mailbox.new_reports(known + SUMMARY) == []
    for other in (f"/x/kernel.py:{a + 1}", f"/x/softmax.py:{a}", "an unknown place"):
        assert len(mailbox.new_reports(known + REPORT.format(f"/x/kernel.py:{b}", other) + SUMMARY)) == 1, other
    assert len(mailbox.new_reports(known)) == 1  # it was cut off
    assert len(mailbox.new_reports("")) == 1


def test_records_that_ran_apart_are_joined() -> None:
    def record(sources: str, *steps: Step) -> GPUTestRecord:
        return GPUTestRecord(context={"commit": "c", "created": str(len(steps))}, sources=sources, steps=list(steps))

    stopped, done = Step(name="laws", problems=["stopped"]), Step(name="laws", passed=3)
    joined = join([record("s", Step(name="kernels", passed=2), stopped), record("s", done)], ["laws"])
    assert joined.steps == [done]
    assert joined.context["joined"] == ["2", "1"]
    with pytest.raises(ValueError, match="expected records of sources s at c, got other at c"):
        join([record("s"), record("other")])


def test_steps_that_are_not_run_again_stay_where_sources_are_the_same(tmp_path: Path) -> None:
    path, old = tmp_path / "record.json", GPUTestRecord(sources="a", steps=[Step(name="one"), Step(name="two")])
    for sources, exists, kept in (("a", False, []), ("a", True, ["two"]), ("b", True, [])):
        if exists:
            old.save(path)
        new = GPUTestRecord(sources=sources)
        new.keep(path, ["one", "three"])
        assert [step.name for step in new.steps] == kept
