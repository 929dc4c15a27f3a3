"""Records, pictures and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from thrift_lab.bench import plots
from thrift_lab.bench.bench_cli import app
from thrift_lab.bench.bench_records import BenchRecord, BenchRow, KernelTime, make_context
from thrift_lab.bench.cases import TARGET, DecodeCase, PrefillCase, plain_bytes, thrift_bytes
from thrift_lab.bench.check import Check
from thrift_lab.bench.flashinfer_build import Spec, specs_for
from thrift_lab.bench.timing import require_cuda

GREEN = [Check("small", 1e-3, 2e-3), Check("big", 1e-3, 2e-3)]


def timed(case, name, kind, us, moved):
    spread = [us * (1 + 0.01 * at) for at in (-2, -1, 0, 1, 2)]
    return BenchRow(case, name, kind, "words", "timed", bytes=moved, bytes_per_token=9.0, checks=GREEN, runs_us=spread)


def fake_record(cases=TARGET):
    """A record with made-up times: the shape of a real one."""
    context = make_context({"replays": 5})
    context["machine"]["gpu"] = "made-up GPU"
    rows = []
    for case in cases:
        shape, wide, narrow = case.shape, plain_bytes(case, 2), plain_bytes(case, 1)
        if all(row.case != shape for row in rows):
            rows += [
                timed(shape, "cuDNN SDPA", "bf16", wide / 2.8e6 + 6, wide),
                timed(shape, "FlashAttention-3", "bf16", wide / 2.6e6 + 30, wide),
                timed(shape, "FlashInfer FP8 KV", "fp8", narrow / 2.4e6 + 25, narrow),
                BenchRow(
                    shape, "FlashAttention-2", "bf16", "words", "absent", "import flash_attn: ModuleNotFoundError"
                ),
            ]
        ours = thrift_bytes(case)["step"]
        row = timed(case, f"thrift {case.promoted_storage} {case.budget}", "thrift", ours / 2.3e6 + 18, ours)
        rows.append(
            replace(row, kernels=[KernelTime("attend", 10, [5.0, 6.0, 7.0])], profile={"attend_split_kernel": 5.5})
        )
    return BenchRecord(context=context, copy_bytes_per_s=2.97e12, matmul_flop_per_s=7.8e14, rows=rows)


def test_round_trip(tmp_path):
    record = fake_record()
    path = tmp_path / "deep" / "decode.json"
    record.save(path)
    again = BenchRecord.load(path)
    assert again == record
    assert not list(path.parent.glob("*.tmp"))
    plain = json.loads(path.read_text())
    row = next(row for row in plain["rows"] if row["status"] == "timed")
    assert row["p20_us"] < row["p50_us"] < row["p80_us"]
    assert len(row["runs_us"]) == 5


def test_options_without_effect_are_stored_and_rows_from_before_do_not_know_them():
    case = PrefillCase(kv=256, base_format="fp8")
    row = replace(timed(case, "thrift", "thrift", 5.0, 5), ignored=case.ignored)
    plain = json.loads(json.dumps(row.to_dict()))
    assert {"smooth", "scales", "normalize"} <= set(plain["ignored"])
    assert BenchRow.from_dict(plain, "prefill") == row
    del plain["ignored"]
    assert BenchRow.from_dict(plain, "prefill") == replace(row, ignored=None)


def test_context_names_versions_machine_and_commit(monkeypatch):
    monkeypatch.setenv("THRIFT_COMMIT", "abc123")
    context = make_context({"replays": 5})
    assert context["commit"] == "abc123"
    assert context["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    assert {"fa3_fwd", "flashinfer-python", "triton", "cuda", "cudnn"} <= set(context["versions"])
    assert context["created"].endswith("+00:00")
    assert "gpu" in context["machine"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"kind": "nll", "schema": 1}')
    with pytest.raises(ValueError, match="not a record of kind decode or prefill"):
        BenchRecord.load(path)


def test_speedups_take_the_fastest_of_each_kind():
    record = fake_record()
    first = record.speedups()[0]
    assert first.bf16 is not None
    assert first.bf16.method == "cuDNN SDPA"
    assert first.fp8 is not None
    assert first.over("bf16") == pytest.approx(first.bf16.p50_us / first.ours.p50_us)
    assert 3.2 < (first.ceiling("bf16") or 0) < 3.4
    record.rows = [row for row in record.rows if row.kind != "fp8"]
    assert record.speedups()[0].over("fp8") is None


def test_rows_are_found_by_case_and_method():
    record = fake_record()
    assert record.find(TARGET[0], "cuDNN SDPA") is None  # baselines lie under the shape
    assert record.find(TARGET[0].shape, "cuDNN SDPA") is not None


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    written = plots.draw(fake_record(), tmp_path)
    assert sorted(path.name for path in written) == ["roofline.png", "speedup.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000 for path in written)


def test_nothing_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    record = fake_record()
    record.rows = [row for row in record.rows if row.status != "timed"]
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.speedup(record, tmp_path / "x.png")
    assert plots.draw(record, tmp_path) == []


def test_summary_lists_every_row():
    table = fake_record().table()
    assert table.drawn().row_count == len(table.rows) == len(fake_record().rows)


def test_plot_command(tmp_path):
    pytest.importorskip("matplotlib")
    fake_record(TARGET[:1]).save(tmp_path / "decode.json")
    done = CliRunner().invoke(app, ["plot", str(tmp_path / "decode.json"), "--out", str(tmp_path / "pictures")])
    assert done.exit_code == 0
    assert (tmp_path / "pictures" / "roofline.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA is told")
def test_decode_needs_cuda(tmp_path):
    with pytest.raises(NotImplementedError, match="CUDA device"):
        require_cuda()
    done = CliRunner().invoke(app, ["decode", "--preset", "smoke", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "needs a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_flashinfer_modules_are_named_once():
    cases = (DecodeCase(batch=1, kv=64), DecodeCase(batch=8, kv=128), DecodeCase(batch=1, kv=64, q_heads=8))
    specs = specs_for(cases)
    assert len(specs) == len(set(specs)) == 8
    assert Spec("xqa", "bfloat16", True, 128, 4) in specs
    assert Spec("decode", "bfloat16", False, 128, 0) in specs
    assert Spec("prefill", "bfloat16", True, 128, 0) in specs
