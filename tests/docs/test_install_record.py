"""The record of ``make test-install`` is green and speaks for today's install lines."""

from __future__ import annotations

from pathlib import Path

from thrift_lab.install_tests import CASES, InstallRecord, digest_of_lines

RECORD = Path(__file__).parents[2] / "benchmarks/results/install-tests.json"


def test_every_install_line_serves_what_stands_below_it() -> None:
    record = InstallRecord.load(RECORD)
    assert digest_of_lines() == record.sources, "what is installed or run has changed since: make test-install"
    assert {step.name for step in record.steps} == {case.name for case in CASES}
    for step in record.steps:
        assert step.is_green, (step.name, step.problems)
