"""The record of ``make test-matrix`` is green, of both ends of the range, and speaks for today's sources."""

from __future__ import annotations

from pathlib import Path

import thrift_attn
from thrift_lab.matrix_tests import FOLDERS, ROOMS, MatrixRecord
from thrift_lab.provenance import digest_of_sources, tested_versions

RECORD = Path(__file__).parents[2] / "benchmarks/results/test-matrix.json"


def test_the_record_speaks_for_these_sources() -> None:
    record = MatrixRecord.load(RECORD)
    now = digest_of_sources(Path(thrift_attn.__file__).parent, ROOMS)
    assert now == record.sources, "sources have changed since: run make test-matrix"
    for package in ("torch", "transformers"):
        ran = [".".join(str(row.versions[package]).split(".")[:2]) for row in record.rows]
        assert tuple(ran) == tested_versions()[package]
    for row in record.rows:
        assert [step.name for step in row.steps] == list(FOLDERS)
        assert all(step.is_green for step in row.steps)
