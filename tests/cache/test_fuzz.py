"""A stateful fuzz of the paged cache beside a model of what it holds; planted bugs that it finds; interrupts at every line."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from support.planted_bugs import PLANTED, SEEDS
from thrift_attn.cache import state
from thrift_lab.fuzz.campaign import Campaign
from thrift_lab.fuzz.laws import Finding
from thrift_lab.fuzz.machine import Machine
from thrift_lab.fuzz.refusals import REFUSALS
from thrift_lab.fuzz.settings import TOKEN_KINDS, Setting

PLAIN = Setting(
    dtype="float32",
    head_dim=16,
    kv_heads=1,
    group=2,
    batch=3,
    num_pages=16,
    max_pages=8,
    max_tokens=None,
    options={"promoted_storage": "nested8", "scales": "max", "budget": "top_k(1)"},
)

FEW = replace(PLAIN, floor=2, options=PLAIN.options | {"residual_share": 0.3})
"""With residents to give up."""

small, seeds = st.integers(0, 3), st.integers(0, 2**20)
counts = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 192]), st.integers(0, 200))
kinds = st.sampled_from(TOKEN_KINDS)
appends = st.fixed_dictionaries(
    {
        "which": small,
        "lengths": st.lists(counts, min_size=1, max_size=3),
        "seed": seeds,
        "kind": kinds,
        "asked": st.booleans(),
    }
)
truncates = st.fixed_dictionaries({"which": small, "seq": small, "back": st.integers(0, 600)})
forks = st.fixed_dictionaries({"which": small, "source": small, "target": small})
frees = st.fixed_dictionaries({"which": small, "seq": small})
selects = st.fixed_dictionaries({"which": small, "seqs": st.lists(small, min_size=1, max_size=4)})
reserves = st.fixed_dictionaries({"which": small, "tokens": counts})
reloads = st.fixed_dictionaries({"which": small, "more_pages": st.integers(0, 8)})
branches = st.fixed_dictionaries({"which": small})
changes = {
    "append": appends,
    "truncate": truncates,
    "fork": forks,
    "free": frees,
    "select": selects,
    "reserve": reserves,
    "reload": reloads,
    "branch": branches,
}
any_change = st.sampled_from(list(changes)).flatmap(lambda name: st.tuples(st.just(name), changes[name]))
threaded = st.sampled_from(["append", "truncate", "fork", "free", "select"]).flatmap(
    lambda name: st.tuples(st.just(name), changes[name])
)
options = st.fixed_dictionaries(
    {
        "scale": st.sampled_from([None, 0.02, 0.3]),
        "window": st.one_of(st.none(), st.integers(1, 300)),
        "softcap": st.sampled_from([None, 20.0, 2.0]),
    }
)


class CacheMachine(RuleBasedStateMachine):
    """Every rule is an operation of `thrift_lab.fuzz.machine.Machine`, which checks all laws after each."""

    machine: Machine

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.machine = Machine(Setting.draw(random.Random(seed)))

    @rule(arguments=appends)
    def append(self, arguments: dict[str, Any]) -> None:
        self.machine.apply("append", **arguments)

    @rule(arguments=appends)
    def append_more(self, arguments: dict[str, Any]) -> None:
        self.machine.apply("append", **arguments)

    @rule(which=small, count=st.integers(1, 16), seed=seeds, options=options)
    def attend(self, which: int, count: int, seed: int, options: dict[str, Any]) -> None:
        self.machine.apply("attend", which=which, count=count, seed=seed, options=options)

    @rule(change=any_change)
    def change(self, change: tuple[str, dict[str, Any]]) -> None:
        self.machine.apply(change[0], **change[1])

    @rule(arguments=truncates)
    def truncate(self, arguments: dict[str, Any]) -> None:
        self.machine.apply("truncate", **arguments)

    @rule(which=small)
    def drop(self, which: int) -> None:
        self.machine.apply("drop", which=which)

    @rule(which=small, kind=st.integers(0, len(REFUSALS) - 1), seq=small)
    def refuse(self, which: int, kind: int, seq: int) -> None:
        self.machine.apply("refuse", which=which, kind=kind, seq=seq)

    @rule(first=threaded, second=threaded, reads=seeds)
    def together(self, first: Any, second: Any, reads: int) -> None:
        self.machine.apply("together", first=first, second=second, reads=reads)

    @rule(change=any_change, at=st.floats(0, 0.999))
    def interrupt(self, change: tuple[str, dict[str, Any]], at: float) -> None:
        self.machine.apply("interrupted", name=change[0], arguments=change[1], at=at)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(2))
def test_a_campaign_finds_nothing(seed: int) -> None:
    record = Campaign(operations=450, interrupts=60, seed=seed).run()
    assert [found.what for found in record.findings] == []
    assert record.operations >= 450
    assert record.interrupts >= 60
    assert min(record.counts.values()) > 0


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[name](monkeypatch)
    campaign = Campaign(operations=6000, interrupts=1000 if "interrupt" in name else 0, seed=SEEDS.get(name, 3))
    record = campaign.run(most_findings=1)
    assert len(record.findings) == 1, f"not found in {record.operations} operations"
    found = record.findings[0]
    monkeypatch.undo()
    assert campaign.play(found.episode).found is None, "it was found for another reason"


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("lengths", [[0], [70, 0, 128]])
def test_a_wrong_call_is_refused_and_changes_nothing(name: str, lengths: list[int]) -> None:
    machine = Machine(PLAIN)
    machine.apply("append", which=0, lengths=lengths, seed=2, kind="plain")
    machine.apply("refuse", which=0, kind=list(REFUSALS).index(name), seq=1)
    machine.apply("attend", which=0, count=1, seed=1, options={})


EVERY_LINE: dict[str, tuple[str, dict[str, Any]]] = {
    "append": ("append", {"lengths": [58, 0, 5], "seed": 4, "kind": "plain"}),
    "fork": ("fork", {"source": 0, "target": 1}),
    "truncate": ("truncate", {"seq": 0, "back": 10}),
    "truncate into a page": ("truncate", {"seq": 2, "back": 150}),
    "free": ("free", {"seq": 2}),
    "select": ("select", {"seqs": [2, 0, 0, 1]}),
    "reserve": ("reserve", {"tokens": 70}),
    "branch": ("branch", {}),
    "load": ("reload", {"more_pages": 2}),
}


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, PLAIN) for name in EVERY_LINE] + [("truncate", FEW)],
    ids=lambda x: x if isinstance(x, str) else "few residents" if x is FEW else "all",
)
def test_an_interrupt_at_any_line(name: str, setting: Setting) -> None:
    """The cache is right at the next step, or says that it is not; and so is the one that shares its pages."""
    change, arguments = EVERY_LINE[name]

    first = Machine(setting)
    first.apply("append", which=0, lengths=[70, 63, 200], seed=2, kind="plain")
    saved = state.state_dict(first.members[0].cache)

    def ready() -> Machine:
        machine = Machine(setting)
        state.load_state_dict(machine.members[0].cache, saved)
        machine.members[0].seqs = first.members[0].seqs
        machine.members[0].look()
        machine.apply("branch", which=0)
        return machine

    line, interrupted, broken = 0, True, 0
    while interrupted:
        line += 1
        machine = ready()
        cache = machine.members[0].cache
        interrupted = machine.interrupt(getattr(machine, f"_{change}")(which=0, **arguments), line)
        broken += not cache.is_intact
        if line % 32 == 0:
            for which in range(2):
                machine.apply("append", which=which, lengths=[64], seed=3, kind="plain")
                machine.apply("attend", which=which, count=2, seed=1, options={})
    assert line > 10
    assert broken < line
    if change not in ("branch", "reload"):  # which only read
        assert broken > 0


def test_a_finding_tells_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED["fork_leaves_the_tail"](monkeypatch)
    machine = Machine(PLAIN)
    machine.apply("append", which=0, lengths=[70, 3, 200], seed=2, kind="plain")
    with pytest.raises(Finding, match=r"(?s)sequence 1 is not what sequence 0 was.*'head_dim': 16.*\('fork'"):
        machine.apply("fork", which=0, source=0, target=1)
