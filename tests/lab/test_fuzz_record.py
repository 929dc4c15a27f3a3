"""``thrift bench fuzz``: its record and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import thrift_attn
from support.planted_bugs import PLANTED
from thrift_lab.bench.bench_cli import app
from thrift_lab.fuzz.campaign import ROOMS, Campaign, FuzzRecord
from thrift_lab.provenance import digest_of_sources

PACKAGE = Path(thrift_attn.__file__).parent
RECORD = Path(__file__).parents[2] / "benchmarks/results/fuzz.json"
AGAIN = "thrift bench fuzz --operations 100000 --interrupts 1000 --seed 23 --workers 2 -o benchmarks/results/fuzz.json"


def test_the_committed_campaign_speaks_for_this_cache_and_found_nothing() -> None:
    record = FuzzRecord.load(RECORD)
    assert record.sources == digest_of_sources(PACKAGE, ROOMS), f"the cache has changed since: {AGAIN}"
    assert record.operations >= 100_000
    assert record.interrupts >= 1_000
    assert record.findings == []


def test_a_campaign_is_a_record(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"
    done = CliRunner().invoke(
        app, ["fuzz", "--operations", "150", "--interrupts", "10", "--seed", "3", "-o", str(path)]
    )
    assert done.exit_code == 0, done.output
    assert "0 findings" in done.output
    record = FuzzRecord.load(path)
    assert (record.operations, record.seed, record.findings) == (record.episodes * 150, 3, [])
    assert record.interrupts >= 10
    assert sum(record.counts.values()) == record.operations
    assert record.sources
    assert record.context["versions"]["torch"]


def test_a_finding_is_told_and_can_be_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED["freed_page_is_still_in_a_table"](monkeypatch)
    path = tmp_path / "fuzz.json"
    done = CliRunner().invoke(app, ["fuzz", "--operations", "100", "-o", str(path)])
    assert done.exit_code == 1
    found = FuzzRecord.load(path).findings[0]
    assert f"episode {found.episode}: {found.what.splitlines()[0]}" in done.output.replace("\n", " ")
    again = Campaign(operations=100).play(found.episode).found
    assert again is not None  # at another operation perhaps, since threads take turns as they like
    assert again.what


def test_processes_find_what_one_finds() -> None:
    one, two = (Campaign(operations=300, interrupts=10).run(workers=workers) for workers in (1, 2))
    assert (one.counts, one.interrupts, one.findings) == (two.counts, two.interrupts, two.findings)


def test_a_campaign_ends_after_the_time() -> None:
    assert Campaign(operations=1000, minutes=0.0).run().episodes == 1
    with pytest.raises(ValueError, match="at least 1 operation and 0 interrupts, got 0, 0"):
        Campaign(operations=0)
