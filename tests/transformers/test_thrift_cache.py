"""ThriftCache as past_key_values: exact at budget 1 with a full-precision plane, against DynamicCache and eager attention."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.thrift_caches import cache_for, enabled, greedy, same, stored
from support.tiny_models import EXACT, FAMILIES, build, close, padded, tokens
from thrift_attn import ThriftConfig, fraction, top_k

transformers = pytest.importorskip("transformers", minversion="5.0")
thrift = pytest.importorskip("thrift_attn.transformers")
from thrift_attn.transformers.lazy_kv import Cached  # noqa: E402

DECODERS = ("llama", "qwen2", "qwen3", "mistral", "qwen2-window", "gemma3", "gemma2")


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_generation_equals_that_of_eager_attention(family: str) -> None:
    plain, model = enabled(family)
    ids, mask, _ = padded([70, 9, 130], "left")
    cache = cache_for(model)
    same(greedy(model, ids, attention_mask=mask, past_key_values=cache), greedy(plain, ids, attention_mask=mask))
    reasons = {row.layer: row.reason for row in thrift.report(model)}
    for index, by in enumerate(FAMILIES[family][2]):
        assert (reasons[index] == "causal, cached") == (by == "thrift")
    assert [cache.tokens(row) for row in range(3)] == [77, 16, 137]  # no padding in pages


@torch.no_grad()
def test_default_configuration_is_near_and_uses_half_the_bytes() -> None:
    plain, model = enabled("llama", dtype=torch.bfloat16, num_hidden_layers=1, head_dim=64)
    ids = tokens(1, 1300)
    cache = thrift.ThriftCache(model.config, 2048)
    want, got = (m(ids[:, :1299], use_cache=True, past_key_values=c) for m, c in ((plain, None), (model, cache)))
    last = plain(ids[:, 1299:], past_key_values=want.past_key_values).logits
    step = model(ids[:, 1299:], past_key_values=got.past_key_values).logits
    assert float((step - last).norm() / last.norm()) < 0.1
    assert cache.bytes_per_token() < 0.6 * 2 * 2 * 2 * 64
    row = thrift.report(model)[0]
    assert row.served_by == "thrift"
    assert 0 < row.stats.promoted < row.stats.visible


def test_exact_tokens_does_nothing_and_says_so() -> None:
    _, model = enabled(num_hidden_layers=1)
    with pytest.warns(DeprecationWarning, match="exact_tokens does nothing"):
        cache = thrift.ThriftCache(model.config, 512, exact_tokens=0)
    assert cache.options == thrift.ThriftCache(model.config, 512).options
    with pytest.warns(DeprecationWarning, match="tokens does nothing"):
        assert cache.prefill_on(torch.device("cpu"), 5) == cache.prefill_on(torch.device("cpu"))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_chunks_equal_one_go(side: str) -> None:
    plain, model = enabled()
    ids, mask, positions = padded([150, 61, 0, 97], side)
    want = plain(ids, attention_mask=mask, position_ids=positions).logits
    cache, got, start = cache_for(model), [], 0
    for size in (63, 1, 5, 64, 17):
        part = slice(start, start + size)
        inputs = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        got.append(model(ids[:, part], past_key_values=cache, **inputs).logits)
        start += size
    assert cache.get_seq_length() == 150
    close(torch.cat(got, 1)[mask.bool()], want[mask.bool()])


@torch.no_grad()
def test_padding_between_tokens_is_left_out() -> None:
    plain, model = enabled()
    ids, mask = tokens(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[0, 100:140] = 0  # a shared prefix, then questions of unequal length
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    want = plain(ids, attention_mask=mask, position_ids=positions).logits
    cache = cache_for(model)
    first = model(ids[:, :100], position_ids=positions[:, :100], past_key_values=cache).logits
    rest = model(ids[:, 100:], attention_mask=mask, position_ids=positions[:, 100:], past_key_values=cache).logits
    close(torch.cat([first, rest], 1)[mask.bool()], want[mask.bool()])
    assert [cache.tokens(row) for row in range(2)] == [160, 200]
    assert all(row.served_by == "thrift" for row in thrift.report(model))


def test_beam_search() -> None:
    plain, model = enabled()
    ids, mask, _ = padded([70, 23], "left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 70, "num_beams": 3, "do_sample": False}
    cache = cache_for(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), plain.generate(ids, **options))
    shared = stored(cache).table
    assert shared.free_pages > len(shared._references) - 6 * (139 // 64)  # beams share what they have in common


def test_assisted_generation() -> None:
    plain, model = enabled(eos_token_id=96)  # transformers 5.0 looks prompts up only for models with an end token
    ids = tokens(1, 100)
    want = plain.generate(ids, max_new_tokens=30, do_sample=False)
    helper = build("llama", num_hidden_layers=1, eos_token_id=96)
    helper.generation_config.num_assistant_tokens = 5
    got = model.generate(
        ids, past_key_values=cache_for(model), assistant_model=helper, max_new_tokens=30, do_sample=False
    )
    assert torch.equal(got, want)
    options: dict[str, Any] = {"past_key_values": cache_for(model), "prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(ids, max_new_tokens=30, do_sample=False, **options), want)


# -- sequences do not see each other ----------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_do_not_depend_on_their_neighbours() -> None:
    _, model = enabled()
    ids, mask, positions = padded([180, 70, 9], "left")
    together = thrift.ThriftCache(model.config, 256)
    inputs = {"attention_mask": mask, "position_ids": positions}
    prompt = model(ids, past_key_values=together, **inputs).logits
    pages = stored(together).table.pages(0).tolist()
    assert pages
    for layer in together.paged_layers:  # what belongs to row 0 becomes NaN
        layer.paged.pool.base[pages] = layer.paged.pool.high[pages] = -1
        layer.paged.pool.k_block_mean[pages] = torch.nan
        layer.paged.tail[0] = torch.nan
    new = tokens(3, 1, seed=8)
    more = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    step = model(new, attention_mask=more, position_ids=positions[:, -1:] + 1, past_key_values=together).logits
    assert step[0].isnan().all()
    for row, length in ((1, 70), (2, 9)):
        alone = thrift.ThriftCache(model.config, 256)
        close(prompt[row, -length:], model(tokens(1, length, seed=row), past_key_values=alone).logits[0])
        close(step[row], model(new[row : row + 1], past_key_values=alone).logits[0])


# -- shrinking, sharing, saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_crop_takes_back_what_was_appended(family: str) -> None:
    plain, model = enabled(family)
    ids, other = tokens(1, 40), tokens(1, 20, seed=5)
    want = plain(torch.cat([ids[:, :30], other], 1)).logits[:, 30:]
    for leaves in (-10, 30):  # the second is how transformers 5.0 says it
        cache = cache_for(model)
        model(ids, past_key_values=cache)
        cache.crop(leaves) if leaves < 0 or family == "llama" else cache.crop(-10)
        assert cache.get_seq_length() == 30
        close(model(other, past_key_values=cache).logits, want)


@torch.no_grad()
def test_crop_counts_padding() -> None:
    plain, model = enabled()
    ids, mask, positions = padded([100, 40], "left")
    cache = cache_for(model)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.crop(-50)
    assert [cache.tokens(row) for row in range(2)] == [50, 0]
    cut = {"attention_mask": mask[:, :80], "position_ids": positions[:, :80]}
    want = plain(ids[:, :80], **cut).logits[:, 50:]
    got = model(ids[:, 50:80], attention_mask=mask[:, :80], position_ids=positions[:, 50:80], past_key_values=cache)
    close(got.logits[mask[:, 50:80].bool()], want[mask[:, 50:80].bool()])


@torch.no_grad()
def test_repeat_and_select_rows() -> None:
    plain, model = enabled()
    ids = tokens(2, 100)
    cache = cache_for(model)
    model(ids, past_key_values=cache)
    free = stored(cache).table.free_pages
    cache.batch_repeat_interleave(2)
    assert stored(cache).table.free_pages == free
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    new = tokens(3, 20, seed=3)
    want = plain(torch.cat([ids[[1, 0, 1]], new], 1)).logits[:, 100:]
    close(model(new, past_key_values=cache).logits, want)


@pytest.mark.parametrize("copied", ["fork", "deepcopy"])
@torch.no_grad()
def test_forks_share_a_prefix(copied: str) -> None:
    plain, model = enabled("gemma3")
    prefix, questions = tokens(1, 140), [tokens(1, n, seed=n) for n in (1, 17, 70)]
    cache = cache_for(model, pool_tokens=64 * 6)
    model(prefix, past_key_values=cache)
    free = stored(cache).table.free_pages
    for question in questions:
        branch = cache.fork() if copied == "fork" else copy.deepcopy(cache)
        assert stored(branch).pool is stored(cache).pool
        want = plain(torch.cat([prefix, question], 1)).logits[:, 140:]
        close(model(question, past_key_values=branch).logits, want)
        del branch
        gc.collect()
        assert stored(cache).table.free_pages == free
    assert cache.get_seq_length() == 140


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_saved_cache_goes_on_as_the_first_would(family: str, tmp_path: Any) -> None:
    _, model = enabled(family)
    ids, mask, positions = padded([150, 70], "left")
    cache, file = thrift.ThriftCache(model.config, 256), tmp_path / "prompt.safetensors"
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.save(file)
    other = thrift.ThriftCache(model.config, 512).load(file)
    more = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], 1)
    after = {"attention_mask": more, "position_ids": positions[:, -1:] + 1 + torch.arange(20)}
    want, got = (model(tokens(2, 20, seed=4), past_key_values=c, **after).logits for c in (cache, other))
    assert torch.equal(got, want)


def test_files_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    _, model = enabled()
    file = tmp_path / "prompt.safetensors"
    cache = cache_for(model)
    with pytest.raises(ValueError, match="empty"):
        cache.save(file)
    with torch.no_grad():
        model(tokens(1, 130), past_key_values=cache)
    cache.save(file)
    for other, problem in (
        (cache, "not empty"),
        (thrift.ThriftCache(model.config, 512), "stores K and V as"),
        (cache_for(build("llama", num_hidden_layers=3)), "layers"),
        (cache_for(model, max_tokens=64), "may have 64"),
        (cache_for(build("llama", head_dim=32)), "head_dim 16 in place of 32"),
    ):
        held = other.get_seq_length()
        with pytest.raises((ValueError, RuntimeError), match=problem):
            other.load(file)
        assert other.get_seq_length() == held
    torch.save({}, tmp_path / "other")
    with pytest.raises(Exception, match=r"[Hh]eader|format"):
        cache_for(model).load(tmp_path / "other")


# -- attention that does not know the cache ---------------------------------------------------------------------------


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@torch.no_grad()
def test_other_attention_reads_widened_pages(attn: str) -> None:
    model = build("llama", attn=attn)
    ids, mask, positions = padded([90, 40], "left")
    want = model(ids, attention_mask=mask, position_ids=positions).logits
    cache, got = cache_for(model), []
    for part in (slice(0, 70), slice(70, 71), slice(71, 90)):
        inputs = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        got.append(model(ids[:, part], past_key_values=cache, **inputs).logits)
    close(torch.cat(got, 1)[mask.bool()], want[mask.bool()])


@torch.no_grad()
def test_layers_left_out_and_hidden_tokens_go_to_sdpa() -> None:
    plain, model = enabled()
    thrift.enable(model, layers={0: None})
    ids, mask, positions = padded([90, 40], "left")
    cache, theirs = cache_for(model), transformers.DynamicCache(config=plain.config)
    for m, held in ((plain, theirs), (model, cache)):
        m(ids[:, :80], attention_mask=mask[:, :80], position_ids=positions[:, :80], past_key_values=held)
    mask[:, 60:70] = 0  # the caller hides what the cache holds
    rest = {"attention_mask": mask, "position_ids": positions[:, 80:]}
    want, got = (m(ids[:, 80:], past_key_values=c, **rest).logits for m, c in ((plain, theirs), (model, cache)))
    close(got, want)
    reasons = [(row.layer, row.served_by, row.reason) for row in thrift.report(model)]
    assert (0, "sdpa", "left out by enable(layers=...)") in reasons
    assert (1, "sdpa", "the mask hides tokens that the cache holds") in reasons
    shown = torch.ones(2, 91, dtype=torch.long)
    shown[0, 0] = 0
    with pytest.raises(ValueError, match="shows"):
        model(ids[:, :1], attention_mask=shown, position_ids=positions[:, -1:] + 1, past_key_values=cache)


@torch.no_grad()
def test_cached_tensors_have_the_shape_of_all_tokens_and_widen_on_use() -> None:
    cache = cache_for(build("llama"))
    k, v = torch.randn(2, 1, 2, 70, 16)
    cache.update(k, v, 0)[0].sum()  # looked at: it is in the cache now
    new = torch.randn(2, 1, 2, 3, 16)
    key, value = cache.layers[0].update(new[0], new[1])
    assert isinstance(key, Cached)
    assert key.shape == (1, 2, 73, 16)
    assert cache.layers[0].slots == 70
    assert torch.equal(key + 0, torch.cat([k, new[0]], 2))
    assert torch.equal(value.transpose(1, 2), torch.cat([v, new[1]], 2).transpose(1, 2))
    assert cache.layers[0].slots == 73
    assert repr(key) == "Cached(K [1, 2, 73, 16], torch.float32)"


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_an_interrupted_forward_can_be_done_again(family: str) -> None:
    plain, model = enabled(family)
    ids = tokens(1, 40)
    want = plain(ids).logits
    cache = cache_for(model)
    model(ids[:, :20], past_key_values=cache)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    for part in (ids[:, 20:], ids[:, 20:21])[: 2 if family == "llama" else 1]:
        with pytest.raises(KeyboardInterrupt):
            model(part, past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 20
    if family == "gemma3":  # its sliding-window layer, those of transformers, does not know
        with pytest.raises(RuntimeError, match="interrupted"):
            model(ids[:, 20:], past_key_values=cache)
        cache.crop(0)
    close(model(ids[:, 20:], past_key_values=cache).logits, want[:, 20:])


@torch.no_grad()
def test_running_out_of_pages_leaves_a_usable_cache() -> None:
    plain, model = enabled()
    ids = tokens(1, 200)
    cache = cache_for(model, 256, pool_tokens=128)
    model(ids[:, :150], past_key_values=cache)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="page pool is exhausted"):
            model(ids[:, 150:], past_key_values=cache)
    assert cache.get_seq_length() == 150
    close(model(ids[:, 150:190], past_key_values=cache).logits, plain(ids[:, :190]).logits[:, 150:])
    cache.reset()
    close(model(ids[:, :100], past_key_values=cache).logits, plain(ids[:, :100]).logits)
    with pytest.raises(ValueError, match="like the tokens before"):
        model(tokens(2, 5), past_key_values=cache)
    cache.reset()
    close(model(tokens(2, 50), past_key_values=cache).logits, plain(tokens(2, 50)).logits)


def test_what_it_cannot_serve_is_refused_when_it_is_made() -> None:
    unknown = transformers.LlamaConfig(num_hidden_layers=1)
    unknown.layer_types = ["compressed_sparse_attention"]
    with pytest.raises(NotImplementedError, match="compressed_sparse_attention"):
        thrift.ThriftCache(unknown, 64)
    with pytest.raises(NotImplementedError, match="multiple of 16"):
        thrift.ThriftCache(transformers.LlamaConfig(head_dim=24, num_hidden_layers=1), 64)
    with pytest.raises(TypeError, match="config"):
        thrift.ThriftCache("llama", 64)
    with pytest.raises(ValueError, match="max_tokens"):
        thrift.ThriftCache(transformers.LlamaConfig(), 0)
    cache = thrift.ThriftCache(transformers.LlamaConfig(num_hidden_layers=1), 64)
    k = torch.zeros(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match="one shape"):
        cache.update(k, k[..., :8], 0)
    with pytest.raises(RuntimeError, match="empty"):
        _ = cache.paged_layers[0].paged


# -- what is counted --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_report_counts_what_decode_promotes() -> None:
    """773 tokens are 12 complete blocks and an incomplete one, which is exact anyway: a budget of 5% promotes one of 12."""
    _, model = enabled(num_hidden_layers=1)
    ids, logits, stats = tokens(1, 773), [], []
    for budget in (fraction(0.05), top_k(1), top_k(0)):
        cache = thrift.ThriftCache(model.config, 4096, decode=ThriftConfig.for_cache(budget=budget), prefill=EXACT)
        model(ids, past_key_values=cache)
        thrift.enable(model)
        logits.append(model(ids[:, :1], past_key_values=cache).logits)
        stats.append(thrift.report(model)[0].stats)
    heads = model.config.num_attention_heads
    assert [(s.visible, s.promoted) for s in stats] == [(12 * heads, promoted * heads) for promoted in (1, 1, 0)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])


@torch.no_grad()
def test_a_file_of_another_model_or_a_damaged_one_is_refused(tmp_path: Any) -> None:
    _, model = enabled("llama")
    cache, path = cache_for(model), tmp_path / "prefix.safetensors"
    model(tokens(1, 150), past_key_values=cache)
    cache.save(path)
    other = copy.deepcopy(model.config)
    other.rope_parameters = {**other.rope_parameters, "rope_theta": 5e5}
    with pytest.raises(ValueError, match="another model: rope_parameters"):
        thrift.ThriftCache(other, 512, decode=EXACT).load(path)
    whole = path.read_bytes()
    fresh = cache_for(model)
    for damaged in (whole[:-7], whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:], b"", whole[:50]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            fresh.load(path)
    path.write_bytes(whole.replace(b'slots\\": 150', b'slots\\": 158'))  # of the description, not of a tensor
    assert path.read_bytes() != whole
    with pytest.raises(ValueError, match="damaged"):
        fresh.load(path)
    path.write_bytes(whole)
    fresh.load(path)  # what was refused has left it usable
    assert fresh.get_seq_length() == 150
    assert list(tmp_path.iterdir()) == [path]


def rewrite(path: Any, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    """Write a file anew after a change of its description and its tensors, with a digest that fits."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    from thrift_attn.transformers import files

    with safe_open(str(path), "pt") as file:
        about = json.loads(file.metadata()["thrift_cache"])
        x = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, x)
    about["digest"] = files._digest(about, x)
    save_file(x, str(path), metadata={"thrift_cache": json.dumps(about)})


@torch.no_grad()
def test_files_of_format_5_are_read_and_others_are_refused_by_their_number(tmp_path: Any) -> None:
    _, model = enabled("llama")
    cache, path, ids = cache_for(model), tmp_path / "prefix.safetensors", tokens(1, 150)
    model(ids, past_key_values=cache)
    cache.save(path)

    def as_before(about: dict[str, Any], x: dict[str, torch.Tensor]) -> None:
        about["format"] = 5
        for name in list(x):  # the names in use then
            old = name.replace("tail_blocks", "slots").replace("k_block_mean", "centres")
            x[old] = x.pop(name)

    rewrite(path, as_before)
    fresh = cache_for(model)
    fresh.load(path)
    assert torch.equal(*(model(ids[:, :1], past_key_values=filled).logits for filled in (cache, fresh)))
    rewrite(path, lambda about, x: about.update(format=4))
    with pytest.raises(ValueError, match="must have format 5 or 6, got 4"):
        cache_for(model).load(path)


FORGERIES: dict[str, Any] = {
    "a length": lambda about, x: x["1.tokens"].fill_(64),
    "a negative length": lambda about, x: x["0.tokens"].fill_(-5),
    "a huge length": lambda about, x: x["0.tokens"].fill_(10**6),
    "tail blocks": lambda about, x: x["0.tail_blocks"].copy_(torch.tensor([[7, 9]])),
    "pages": lambda about, x: x["0.blocks"].fill_(99),
    "slots": lambda about, x: about["layers"][0].update(slots=3),
    "layers": lambda about, x: about.pop("layers"),
    "a missing tensor": lambda about, x: x.pop("0.sink_value"),
    "an unknown tensor": lambda about, x: x.update({"0.more": torch.zeros(1)}),
    "a shape": lambda about, x: x.update({"0.sink_value": torch.zeros(1)}),
    "a dtype": lambda about, x: x.update({"0.tail": x["0.tail"].half()}),
    "a scale": lambda about, x: x["0.k_channel_scale"].fill_(3.0),
}


@pytest.mark.parametrize("forgery", FORGERIES)
@torch.no_grad()
def test_a_forged_file_is_refused_and_leaves_the_cache_usable(forgery: str, tmp_path: Any) -> None:
    _, model = enabled("llama")
    cache, path, ids = cache_for(model), tmp_path / "prefix.safetensors", tokens(1, 150)
    want = model(ids, past_key_values=cache).logits
    cache.save(path)
    rewrite(path, FORGERIES[forgery])
    fresh = cache_for(model)
    with pytest.raises(ValueError, match=r"(damaged|expected|needs|cannot|must|may have|at least|pages|dtype)"):
        fresh.load(path)
    assert torch.equal(model(ids, past_key_values=fresh).logits, want)
