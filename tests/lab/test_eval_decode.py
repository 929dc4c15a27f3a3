"""Decoding through the cache against the plain model: exact where it must be, counted right, on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from support.letters import EXACT, Letters
from support.tiny_models import build
from thrift_attn import fraction
from thrift_attn.config import ThriftConfig

pytest.importorskip("transformers", minversion="5.0")
from thrift_lab import cli, models
from thrift_lab.eval import decode_quality as decode
from thrift_lab.eval import through_cache
from thrift_lab.eval.nll import token_nll
from thrift_lab.models import Loaded
from thrift_lab.records import Record

TEXT = "".join(chr(33 + int(i)) for i in torch.randint(0, 90, (1200,), generator=torch.Generator().manual_seed(0)))
SIZES = {"prompts": 3, "shortest": 100, "longest": 300, "new": 9, "needles": 3}


def loaded() -> Loaded:
    return Loaded("tiny", build("llama", attn="sdpa"), Letters())


@torch.no_grad()
def test_exact_cache_has_no_divergence(tmp_path: Path) -> None:
    said: list[str] = []
    record = decode.evaluate(loaded(), TEXT, config=EXACT, log=said.append, text_name="noise", **SIZES)
    assert [one.prompt for one in record.continuations] == [100, 200, 300]
    assert [one.start for one in record.continuations] == [0, 109, 318]
    assert all(len(one.kl) == len(one.same_top) == 9 for one in record.continuations)
    assert abs(record.kl) < 1e-6
    assert record.same_top == 1.0
    assert sorted(needle.depth for needle in record.needles) == [0, 0.5, 1]
    assert all(needle.plain == needle.cached for needle in record.needles)
    assert len(said) == 6
    record.save(tmp_path / "x" / "record.json")
    assert decode.DecodeRecord.load(tmp_path / "x" / "record.json") == record
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(ValueError, match="not a record of kind decode-quality"):
        decode.DecodeRecord.load(tmp_path / "y.json")


@torch.no_grad()
def test_divergence_is_that_of_the_distributions() -> None:
    sizes = {**SIZES, "needles": 0}
    record = decode.evaluate(loaded(), TEXT, config=ThriftConfig.for_cache(budget=fraction(0)), **sizes)
    assert all(x > 0 for one in record.continuations for x in one.kl)
    assert 1e-5 < record.kl < 1
    assert math.isclose(record.kl, sum(sum(one.kl) for one in record.continuations) / 27)
    assert record.needles == []


def test_needles_are_counted() -> None:
    one = decode.Needle(0.5, 100, "1234", "is 1234.", "is 12.")
    record = decode.DecodeRecord(needles=[one, decode.Needle(0, 9, "7", "8", "7"), decode.Needle(0, 9, "7", "7", "7")])
    assert (record.found_by_plain, record.lost) == (2, 1)
    assert "loses 1" in record.sentence()


def test_hidden_where_it_was_asked_for() -> None:
    for depth, where in ((0.0, 0), (1.0, 300)):
        ids = decode.hide(loaded(), TEXT, 400, depth, "4321")[0]
        text = Letters().decode(ids.tolist())
        assert len(ids) == 400
        assert abs(text.index("4321") - where) < 60
        assert text.endswith("harbour is")


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="tokens"):
        decode.evaluate(loaded(), TEXT[:200], config=EXACT, **SIZES)
    with pytest.raises(ValueError, match="shortest"):
        decode.lengths(3, 10, 9)
    assert decode.lengths(1, 10, 20) == [10]


def test_depths_are_even_and_independent_of_lengths() -> None:
    assert decode.depths(1) == [0]
    for n in (2, 10, 51):
        found = decode.depths(n)
        assert sorted(found) == [i / (n - 1) for i in range(n)]
    assert abs(sum((i - 25) * (d - 0.5) for i, d in enumerate(found))) < 0.2 * sum(
        (i - 25) ** 2 / 50 for i in range(51)
    )


@torch.no_grad()
def test_a_text_through_the_cache_loses_what_its_residuals_say(tmp_path: Path) -> None:
    """With every block promoted from a 16-bit copy nothing is lost, with no copy kept something is."""
    model = loaded()
    options = {"shares": (1.0, 0.0), "length": 300, "chunk": 40, "steps": 70}
    record = through_cache.evaluate(model, TEXT, config=EXACT, **options)
    plain, whole, none = record.rows
    ids = torch.tensor([Letters()(TEXT, add_special_tokens=False).input_ids[:300]])
    want = token_nll(model.model, model.model.base_model(ids).last_hidden_state[0], ids[0])
    assert plain.chunks == pytest.approx([float(x.mean()) for x in want[:229].split(64)], abs=1e-6)
    assert plain.steps == pytest.approx([float(x.mean()) for x in want[229:].split(64)], abs=1e-6)
    assert whole.all == pytest.approx(plain.all, abs=1e-4)
    assert (whole.resident_share, none.resident_share) == (1.0, 0.0)
    assert abs(whole.kl or 0) < 1e-6 < (none.kl or 0)
    assert record.over_first(whole) == (0.0, (0.0, 0.0))
    assert [len(row.all) for row in record.rows] == [6] * 3
    record.save(tmp_path / "x.json")
    assert through_cache.ThroughCacheRecord.load(tmp_path / "x.json") == record
    two = through_cache.evaluate(model, TEXT, config=EXACT, **options, windows=2)
    assert [len(row.all) for row in two.rows] == [12] * 3
    assert [row.chunks[:4] + row.steps[:2] for row in two.rows] == [row.all for row in record.rows]
    assert two.rows[2].chunks[4:] != none.chunks
    assert (two.rows[2].kl or 0) > 0
    with pytest.raises(ValueError, match="one share of residuals and one window, got 2 and 0"):
        through_cache.evaluate(model, TEXT, config=EXACT, **options, windows=0)
    with pytest.raises(ValueError, match="got chunk 0, steps 70 and length 300"):
        through_cache.evaluate(model, TEXT, config=EXACT, **{**options, "chunk": 0})


@pytest.mark.parametrize(
    ("command", "options", "made"),
    [
        ("decode", "--prompts 1 --shortest 200 --longest 200 --new 5 --needles 0", decode.DecodeRecord),
        ("cache", "--length 200 --steps 64 --shares 1,0", through_cache.ThroughCacheRecord),
    ],
)
def test_commands_print_and_write(
    command: str, options: str, made: type[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *_, **__: loaded())
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "x.json"
    arguments = ["eval", command, "--text", str(tmp_path / "text.txt"), "--budget", "5%", "-o", str(out)]
    done = CliRunner().invoke(cli.app, [*arguments, *options.split()])
    assert done.exit_code == 0, done.output
    record = made.load(out)
    assert record.context["text"] == "text.txt"
    assert f"wrote {out}" in done.output.replace("\n", "")
    wrong = CliRunner().invoke(cli.app, [*arguments, "--budget", "much"])
    assert (wrong.exit_code, "budget must be a share" in wrong.output) == (2, True)
