"""The record of ``make test-gpu`` is green and speaks for today's kernels."""

from __future__ import annotations

from pathlib import Path

import thrift_attn
from thrift_lab.gpu_tests import GPUTestRecord, Mailbox, digest_of_kernels

ROOT = Path(__file__).parents[2]
PACKAGE = Path(thrift_attn.__file__).parent


def test_the_record_speaks_for_these_kernels() -> None:
    record = GPUTestRecord.load(ROOT / "benchmarks/results/gpu-tests.json")
    assert digest_of_kernels(PACKAGE) == record.sources, "kernels have changed since: run make test-gpu on a GPU"
    for step in record.steps:
        assert step.passed > 0, step.name
        assert not step.failed, step.name
        assert not step.problems, step.name


def test_only_the_mailbox_of_warp_specialisation_is_accepted() -> None:
    mailbox = Mailbox.of(PACKAGE / "prefill/sm90_fp8/kernel.py")
    a, b = min(mailbox.lines), max(mailbox.lines)
    report = "========= Error: Race reported between Read access at kernel.py:{}\n=========  and Write at kernel.py:{} hazard\n"
    known, new = report.format(a, b), report.format(101, 99)
    assert mailbox.new_reports(known) == []
    assert len(mailbox.new_reports(known + new)) == 1
