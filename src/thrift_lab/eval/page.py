"""The report of one or more runs: a self-contained HTML page, and the same tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thrift_lab.eval import figures, speed
from thrift_lab.eval.dated import marked, older
from thrift_lab.eval.runs import Run
from thrift_lab.eval.suite_folder import STANDIN
from thrift_lab.extras import need
from thrift_lab.provenance import now
from thrift_lab.records import MARK

_PAIRED = (
    "Differences are paired: every method reads the same samples. Intervals are 95%, from a bootstrap over blocks of 64 tokens "
    "(NLL) or over samples (tasks). Recovered is the share of the loss of uniform FP4 attention that a method brings back."
)
_COSTS = (
    "Cost: prefill in tensor-core operations weighted by their rate on Blackwell (16-bit 1, FP8 1/2, FP4 1/4), decode in bytes "
    "of KV cache read, both relative to dense 16-bit attention (docs/evaluation.md)."
)


def _signed(value: float | None, bounds: list[float] | None, form: str = "{:+.4f}") -> str:
    if value is None:
        return "-"
    if bounds is None:
        return form.format(value)
    return f"{form.format(value)} [{form.format(bounds[0])}, {form.format(bounds[1])}]"


def _percent(value: float | None, bounds: list[float] | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" + (f" [{bounds[0] * 100:.0f}, {bounds[1] * 100:.0f}]" if bounds else "")


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "-" if value is None else form.format(value)


Table = tuple[list[str], list[list[str]]]


def _named(run: Run, name: str) -> str:
    """Return the name of a method, marked where its record is older than today's default."""
    about = run.methods().get(name)
    return name if about is None else marked(name, about["config"])


def nll_table(run: Run) -> Table:
    """Method by method at the longest length."""
    known = run.methods()
    head = ["method", "NLL", "vs fp16 [95%]", "recovered [95%]", "blocks", "prefill cost", "decode cost"]
    body = []
    for row in run.nll():
        about = known[row["method"]]
        body.append(
            [
                _named(run, row["method"]),
                f"{row['nll']:.4f}",
                _signed(row["loss"], row["loss_interval"]),
                "0%" if about["fp4"] else _percent(row["recovered"], row["recovered_interval"]),
                _percent(about["share"]),
                _number(about["prefill_cost"]),
                _number(about["decode_cost"]),
            ]
        )
    return head, body


def text_table(run: Run) -> Table:
    """Loss against fp16 for every text and length."""
    rows = run.metrics["nll"]
    columns = list(dict.fromkeys((row["text"], row["length"]) for row in rows))
    cells = {(row["method"], row["text"], row["length"]): row["loss"] for row in rows}
    names = list(dict.fromkeys(row["method"] for row in [*run.nll(), *rows] if row["loss"] is not None))
    head = ["method", *(f"{Path(text).name} {length:,}" for text, length in columns)]
    return head, [
        [_named(run, name), *(_number(cells.get((name, *at)), "{:+.4f}") for at in columns)] for name in names
    ]


def task_table(run: Run) -> Table:
    """Score of every task and method at the longest length, in per cent."""
    rows = run.tasks()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {(row["task"], row["method"]): row for row in rows}
    head = ["task", "score", "samples", *(_named(run, name) for name in methods)]
    body = []
    for task in tasks:
        first = cells[task, methods[0]]
        scores = [f"{100 * cells[task, m]['score']:.1f}" if (task, m) in cells else "-" for m in methods]
        body.append([_task_name(task, run), first["metric"], str(first["samples"]), *scores])
    return head, body


def gold_table(run: Run) -> Table:
    """NLL of the right answer over all tasks."""
    head = ["method", "score", "vs fp16 [95%]", "NLL of right answer", "vs fp16 [95%]", "recovered [95%]"]
    body = [
        [
            _named(run, row["method"]),
            f"{100 * row['score']:.1f}",
            _signed(row["difference"], row["difference_interval"], "{:+.3f}"),
            f"{row['gold_nll']:.4f}",
            _signed(row["gold_loss"], row["gold_loss_interval"]),
            _percent(row["gold_recovered"], row["gold_recovered_interval"]),
        ]
        for row in run.tasks()
        if row["task"] == "all"
    ]
    return head, body


def concentration_table(run: Run) -> Table:
    """Share of the error in the first blocks by mass."""
    measured = run.metrics["concentration"]
    if not measured:
        return [], []
    head = ["blocks, by attention mass", "share of the error", "10% to 90% of heads", "share of the mass"]
    body = [
        [f"{share:.1%}", f"{error:.1%}", f"{low:.0%} to {high:.0%}", f"{mass:.1%}"]
        for share, error, low, high, mass in zip(
            measured[0]["shares"],
            measured[0]["error_share"],
            measured[0]["error_share_low"],
            measured[0]["error_share_high"],
            measured[0]["mass_share"],
            strict=True,
        )
    ]
    return head, body


def _task_name(task: str, run: Run) -> str:
    """The name, with a star for stand-ins."""
    made = run.plan["data"] == STANDIN and (
        task.startswith(("longbench_", "ruler_qa")) or (task.startswith("helmet_") and task != "helmet_json_kv")
    )
    return task + ("*" if made else "")


def _close(cost: float | None, other: float | None) -> bool:
    """Whether two costs are equal within what rounding to whole blocks can do."""
    return cost is not None and other is not None and abs(cost - other) <= 0.05 * other


def _at_equal_cost(run: Run) -> list[str]:
    """How methods that drop blocks compare with thrift at the same prefill cost, at the longest length that tells."""
    known = run.methods()
    for length in sorted({row["length"] for row in run.metrics["nll"]}, reverse=True):
        rows = {row["method"]: row for row in run.nll(length) if row["loss"] is not None}
        for ours in (name for name in rows if known[name]["family"] == "thrift"):
            cost = known[ours]["prefill_cost"]
            dropping = [name for name in rows if known[name]["sparse"] and _close(known[name]["prefill_cost"], cost)]
            if dropping:
                others = ", ".join(f"{name} {rows[name]['loss']:+.4f}" for name in dropping)
                return [
                    f"Methods that drop blocks, at the prefill cost of {ours} ({_number(cost)} of dense 16-bit attention), in "
                    f"nats from fp16 at {length:,} tokens: {others}; {ours} itself: {rows[ours]['loss']:+.4f}."
                ]
    return []


def findings(run: Run) -> list[str]:
    """What the figures say, in plain sentences, about one method of each kind."""
    sentences: list[str] = []
    known, rows = run.methods(), {row["method"]: row for row in run.nll()}
    fp4 = next((row for name, row in rows.items() if known[name]["fp4"]), None)
    if fp4 is not None and fp4["loss"] is not None:
        windows = f"{fp4['windows']} windows of {fp4['length']:,} tokens"
        sentences.append(
            f"Uniform 4-bit attention costs {_signed(fp4['loss'], fp4['loss_interval'])} nats per token over {windows}."
        )
    shown = [name for name in figures.selected(run.metrics) if rows.get(name, {}).get("loss") is not None]
    for name in shown:
        row = rows[name]
        if row["recovered"] is not None and not known[name]["sparse"]:
            share, back = _percent(known[name]["share"]), _percent(row["recovered"], row["recovered_interval"])
            sentences.append(
                f"{_named(run, name)} ({share} of the blocks promoted) is {row['loss']:+.4f} nats from fp16 and "
                f"brings back {back} of that loss."
            )
    sentences += _at_equal_cost(run)
    overall = {row["method"]: row for row in run.tasks() if row["task"] == "all"}
    if overall:
        scores = ", ".join(f"{_named(run, name)} {100 * overall[name]['score']:.1f}" for name in list(overall)[:10])
        samples = next(iter(overall.values()))["samples"]
        sentences.append(f"Mean score over {samples} samples of all tasks, in per cent: {scores}.")
    return sentences


def losses(run: Run) -> list[str]:
    """Where thrift loses, as far as these samples can tell."""
    sentences: list[str] = []
    known, rows = run.methods(), {row["method"]: row for row in run.nll()}
    chosen = figures.selected(run.metrics)
    ours = [n for n, about in known.items() if about["family"] == "thrift" or (n in chosen and n.startswith("thrift"))]
    worse = [
        f"{_named(run, name)} {_signed(rows[name]['loss'], rows[name]['loss_interval'])}"
        for name in ours
        if name in rows and rows[name]["loss_interval"] and rows[name]["loss_interval"][0] > 0
    ]
    if worse:
        sentences.append(f"Above fp16 beyond noise, in nats per token: {'; '.join(worse)}.")
    for name, row in rows.items():
        if not known[name]["sparse"] and known[name]["family"] != "paper":
            continue
        for mine in ours:
            other = rows.get(mine)
            sure = (row["loss_interval"], other["loss_interval"]) if other else (None, None)
            if other is None or sure[0] is None or sure[1] is None or sure[0][1] >= sure[1][0]:
                continue  # intervals that overlap say nothing
            cheap = [known[at]["prefill_cost"] for at in (name, mine)]
            if None not in cheap and cheap[0] <= cheap[1] * 1.01:
                losing = f"({row['loss']:+.4f}, {other['loss']:+.4f})"
                sentences.append(
                    f"{_named(run, name)} is nearer to fp16 than {_named(run, mine)} at no higher prefill cost {losing}."
                )
    main = next((name for name in figures.in_tasks(run.metrics) if known[name]["family"] == "thrift"), None)
    mine = [row for row in run.tasks() if row["method"] == main and not row["group"]]
    ours_here = "" if main is None else _named(run, main)
    unlikely = [row for row in mine if row["gold_loss_interval"] and row["gold_loss_interval"][0] > 0]
    if unlikely:
        named = ", ".join(f"{_task_name(row['task'], run)} {row['gold_loss']:+.3f}" for row in unlikely)
        sentences.append(
            f"With {ours_here} the right answer is less likely than with fp16 beyond noise on {len(unlikely)} of "
            f"{len(mine)} tasks (nats per token): {named}."
        )
    lower = [row for row in mine if row["difference_interval"] and row["difference_interval"][1] < 0]
    if lower:
        named = ", ".join(f"{_task_name(row['task'], run)} {100 * row['difference']:+.0f}" for row in lower)
        sentences.append(
            f"With {ours_here} the score is below fp16 beyond noise on {len(lower)} of {len(mine)} tasks (points): {named}."
        )
    if not sentences and (rows or mine):
        sentences.append("No difference to fp16 is above noise at the 95% level on these samples.")
    return sentences


def _older_options(run: Run) -> list[tuple[str, str]]:
    """Methods that were recorded under an older default, and what is different today."""
    return [
        (_named(run, about["name"]), f"recorded with {words}")
        for about in run.metrics["methods"]
        if (words := older(about["name"], about["config"]))
    ]


def unfinished(run: Run) -> dict[str, str]:
    """Say what of the plan is not there, by part (``nll``, ``tasks``, ``concentration``); parts that are whole are absent."""
    found: dict[str, str] = {}
    rows = [row for row in run.metrics["nll"] if row["text"] != "all"]
    places = list(dict.fromkeys((row["text"], row["length"]) for row in rows))
    there = {(row["method"], row["text"], row["length"]) for row in rows}
    names = list(dict.fromkeys(row["method"] for row in rows))
    lacking = [name for name in names if any((name, *place) not in there for place in places)]
    if not rows:
        found["nll"] = "Not measured: no NLL has been recorded for this model."
    elif lacking:
        named = ", ".join(_named(run, name) for name in lacking) if len(lacking) <= 4 else f"{len(lacking)} methods"
        found["nll"] = f"Unfinished: not every text and length was run with {named} (- in the tables)."
    planned, tasks = run.plan["samples"], [row for row in run.tasks() if not row["group"]]
    if not tasks:
        found["tasks"] = "Not measured: no task has been recorded for this model."
    else:
        said = []
        few = {row["task"]: row["samples"] for row in tasks if row["samples"] < planned}
        if few:
            least = f"{min(few.values())} of {planned}"
            said.append(f"{len(few)} tasks have as few as {least} planned samples that all methods have answered")
        cells = {(row["task"], row["method"]) for row in tasks}
        methods = list(dict.fromkeys(row["method"] for row in tasks))
        for task in dict.fromkeys(row["task"] for row in tasks):
            absent = [_named(run, name) for name in methods if (task, name) not in cells]
            if absent:
                said.append(f"{task} was not run with {', '.join(absent)}")
        if said:
            found["tasks"] = f"Unfinished: {'; '.join(said)}."
    if not run.metrics["concentration"]:
        found["concentration"] = "Not measured: no error concentration has been recorded for this model."
    return found


def _listed(numbers: Sequence[int]) -> str:
    """Numbers with their thousands apart."""
    return ", ".join(f"{number:,}" for number in numbers) or "no"


def circumstances(run: Run) -> list[tuple[str, str]]:
    """How it was run."""
    last = run.environments[-1] if run.environments else {}
    plan = run.plan
    starts = dict.fromkeys(
        f"{entry['started']} on {entry['device']}, {entry['dtype']}, commit {str(entry['commit'])[:12]}"
        for entry in run.environments
    )
    versions = dict.fromkeys(
        ", ".join(f"{key} {value}" for key, value in entry["versions"].items() if value) for entry in run.environments
    )
    windows = sorted({row["length"] for row in run.metrics["nll"]})
    measured = sorted({row["length"] for row in run.metrics["concentration"]})
    known = [
        ("model", f"{plan['model']}, {last.get('model', {}).get('class', '')}"),
        ("records", run.name),
        ("runs", "; ".join(starts)),
        ("versions", "; ".join(versions)),
        (
            "texts",
            f"{', '.join(plan['texts'])}; NLL over windows of {_listed(windows)} tokens, at most {plan['windows']} each",
        ),
        ("error concentration", f"over {_listed(measured)} tokens"),
    ]
    if run.metrics["tasks"]:
        known += [
            ("tasks", f"{plan['tasks']}; {plan['samples']} samples each of {_listed(plan['lengths'])} tokens"),
            ("answers", f"at most {plan['max_new']} tokens" if plan["max_new"] else "as long as published"),
            ("chat template", "yes" if plan["chat"] else "no"),
            ("seed", str(plan["seed"])),
        ]
    known += _older_options(run)
    known += [
        (f"without effect in {row['name']}", ", ".join(row["ignored"]))
        for row in run.metrics["methods"]
        if row.get("ignored")
    ]
    left = {line for row in run.metrics["methods"] for line in row["unserved"]}
    if lacking := last.get("left_out"):
        known.append(("tasks left out for want of data", ", ".join(lacking)))
    return known + ([("left to the model's own attention", "; ".join(sorted(left)))] if left else [])


_RECORDS = 3
"""Names of records that fit into a headline."""

_OLD = f" {MARK} recorded under an older default; what differs stands below."


def _chapter(run: Run) -> dict[str, Any]:
    """Return what both templates say about a run."""
    lacking = unfinished(run)
    old = _OLD if _older_options(run) else ""
    nll: list[dict[str, Any]] = []
    tasks: list[dict[str, Any]] = []
    if run.metrics["nll"]:
        nll = [
            _captioned(nll_table(run), _COSTS + old),
            _captioned(text_table(run), "Loss against fp16 in nats per token, by text and length."),
        ]
    if run.metrics["tasks"]:
        star = " * stand-in made from the text, not the published set." if run.plan["data"] == STANDIN else ""
        tasks = [
            _captioned(task_table(run), f"Scores in per cent.{star}{old}"),
            _captioned(gold_table(run), "All tasks together, every sample alike."),
        ]
    words = "All heads and layers, pairs of a query block and a KV block ordered by attention mass within their head."
    spread = [_captioned(concentration_table(run), words)] if run.metrics["concentration"] else []
    parts = [
        {"title": f"NLL, {run.longest:,} tokens" if nll else "NLL", "tables": nll, "note": lacking.get("nll")},
        {
            "title": f"Tasks, {run.tasks()[0]['length']:,} tokens" if tasks else "Tasks",
            "tables": tasks,
            "note": lacking.get("tasks"),
        },
        {"title": "Error concentration", "tables": spread, "note": lacking.get("concentration")},
    ]
    return {
        "model": run.plan["model"],
        "name": run.name if run.name.count(", ") < _RECORDS else f"{run.name.count(', ') + 1} records",
        "findings": findings(run),
        "losses": losses(run),
        "parts": parts,
        "circumstances": circumstances(run),
    }


def _chapters(runs: list[Run], benches: Sequence[Path], *, charts: bool) -> list[dict[str, Any]]:
    """Return all chapters, models first, with names for links."""
    found = [{**_chapter(run), "charts": figures.of_run(run.metrics) if charts else []} for run in runs]
    found += filter(None, (speed.speed(benches), speed.memory(benches)) if benches else ())
    for at, chapter in enumerate(found, start=1):
        chapter["id"] = f"chapter-{at}"
        for number, part in enumerate(chapter["parts"], start=1):
            part["id"] = f"chapter-{at}-{number}"
            part.setdefault("note", None)
    return found


def _captioned(table: Table, caption: str) -> dict[str, Any]:
    head, body = table
    return {"head": head, "body": body, "caption": caption}


def _templates(*, escape: bool) -> Any:
    jinja2 = need("jinja2")
    return jinja2.Environment(
        loader=jinja2.PackageLoader("thrift_lab.eval"),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _drawn(figure: Any) -> str:
    """Return a plotly figure as HTML that relies on the library in the head of the page."""
    options = {"displaylogo": False, "displayModeBar": False, "responsive": True}
    drawn = need("plotly.io").to_html(figure, config=options, full_html=False, include_plotlyjs=False)
    return need("markupsafe").Markup(drawn)


def html(runs: list[Run], benches: Sequence[Path] = ()) -> str:
    """Return the whole page; it loads nothing from outside.

    plotly's library is part of it, 4.8 MB once: its Python package has no smaller bundle, a copy from a network would leave the
    page without charts where there is none, and a file beside it gets lost when the page is sent on.

    Args:
        runs: a chapter each.
        benches: records of `thrift bench`, for the chapters on speed and memory.
    """
    environment = _templates(escape=True)
    environment.filters["draw"] = _drawn
    library = need("plotly.offline").get_plotlyjs()
    template = environment.get_template("report.html.j2")
    return template.render(
        chapters=_chapters(runs, benches, charts=True), paired=_PAIRED, made=now()[:10], library=library
    )


def markdown(runs: list[Run], benches: Sequence[Path] = ()) -> str:
    """Return the tables and sentences of the page as Markdown; arguments as in `html`."""
    template = _templates(escape=False).get_template("report.md.j2")
    return template.render(chapters=_chapters(runs, benches, charts=False), paired=_PAIRED, made=now()[:10])
