"""Caches over one pool, what they should hold, the operations on both, and the laws that are checked after each."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from thrift_attn.cache import PagedThriftCache, state
from thrift_attn.config import BLOCK
from thrift_lab.fuzz import laws
from thrift_lab.fuzz.interrupts import Interrupter
from thrift_lab.fuzz.laws import Finding, Member
from thrift_lab.fuzz.refusals import REFUSALS
from thrift_lab.fuzz.settings import Setting
from thrift_lab.fuzz.shadow import Sequence, as_fresh, picture, resident_blocks, same

MEMBERS = 3
"""Most caches at a time."""

FIRST_LINES = 200
"""Lines that a change is thought to have before it has been counted."""


@dataclass(frozen=True)
class Plan:
    """One change of a cache and what is expected of it.

    Args:
        name: of the operation.
        member: whose cache is changed.
        change: what to call; may return a cache.
        after: what the cache holds then.
        touched: sequences that may change.
        refused: the error that is expected, in which case nothing changes.
        made: what becomes of the cache that ``change`` returns: None, ``"another"`` or ``"instead"``.
        sources: the sequences that those of the cache, or of what is made instead, look like afterwards; None if they grow
            or are cut.
    """

    name: str
    member: Member
    change: Callable[[], Any]
    after: tuple[Sequence, ...]
    touched: frozenset[int] = frozenset()
    refused: type[Exception] | tuple[type[Exception], ...] | None = None
    made: str | None = None
    sources: tuple[int, ...] | None = None


class Machine:
    """The machine that a fuzz drives: every operation takes plain numbers, which are taken modulo what there is.

    Args:
        setting: sizes and options.

    Attributes:
        done: how often each operation was done.
        interrupts: how many KeyboardInterrupts were raised inside the library.
        log: the operations so far.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        empty = (Sequence.empty(setting),) * setting.batch
        self.members = [Member(setting.make(setting.batch), empty)]
        self.members[0].look()
        self.done: Counter[str] = Counter()
        self.interrupts = 0
        self.log: list[tuple[str, dict[str, Any]]] = []
        self._leaky = False  # whether an interrupt may have lost pages
        self._lines: dict[str, int] = {}
        self._interrupter = Interrupter()

    def apply(self, name: str, /, **arguments: Any) -> None:
        """Do one operation by name and check all laws.

        Raises:
            Finding: a law does not hold.
        """
        self.log.append((name, arguments))
        self.done[name] += 1
        try:
            getattr(self, name)(**arguments)
        except Exception as error:
            what = error if isinstance(error, Finding) else f"{name} ends with {type(error).__name__}: {error}"
            raise Finding(f"{what}\nsetting: {self.setting.to_dict()}\noperations: {self.log[-12:]}") from error

    # -- operations ----------------------------------------------------------------------------------------------------

    def append(self, which: int, lengths: list[int], seed: int, kind: str, asked: bool = False) -> None:
        """Append so many tokens to each sequence, with their queries or without."""
        self._perform(self._append(which, lengths, seed, kind, asked))

    def free(self, which: int, seq: int) -> None:
        """Empty a sequence."""
        self._perform(self._free(which, seq))

    def fork(self, which: int, source: int, target: int) -> None:
        """Make a sequence a copy of another one."""
        self._perform(self._fork(which, source, target))

    def truncate(self, which: int, seq: int, back: int) -> None:
        """Take tokens of a sequence back."""
        self._perform(self._truncate(which, seq, back))

    def select(self, which: int, seqs: list[int]) -> None:
        """Exchange, repeat or drop sequences."""
        self._perform(self._select(which, seqs))

    def reserve(self, which: int, tokens: int) -> None:
        """Give pages to all sequences."""
        self._perform(self._reserve(which, tokens))

    def branch(self, which: int) -> None:
        """Make another cache over the same pages."""
        if len(self.members) < MEMBERS:
            self._perform(self._branch(which))

    def drop(self, which: int) -> None:
        """Forget a cache; the pages that no other has go back."""
        if len(self.members) > 1:
            self.members.remove(self._member(which))
        self._check_all()

    def reload(self, which: int, more_pages: int) -> None:
        """Write a cache out as the bytes of a file, and read it into a new one with another pool."""
        self._perform(self._reload(which, more_pages))

    def refuse(self, which: int, kind: int, seq: int) -> None:
        """Call a cache wrongly."""
        member = self._member(which)
        name = list(REFUSALS)[kind % len(REFUSALS)]
        try:
            REFUSALS[name](member.cache, self.setting, seq % len(member.seqs))
        except (ValueError, TypeError, NotImplementedError):
            pass
        except Exception as error:
            raise Finding(f"{name} ends with {type(error).__name__}: {error}") from error
        else:
            raise Finding(f"{name} is not refused")
        if not member.cache.is_intact:
            raise Finding(f"{name} has broken the cache")
        self._check_all()

    def attend(self, which: int, count: int, seed: int, options: dict[str, Any]) -> None:
        """Attend with so many new tokens and compare with a fresh cache and with float64."""
        member = self._member(which)
        q = self.setting.queries(len(member.seqs), count, seed)
        out, lse = member.cache.attend(q, return_lse=True, **options)
        for seq, sequence in enumerate(member.seqs):
            laws.check_content(member, seq)
            resident = resident_blocks(member.cache, seq)
            laws.check_attention(sequence, q[seq], out[seq], lse[seq], options, resident)
        self._check_all()

    def together(self, first: tuple[str, dict[str, Any]], second: tuple[str, dict[str, Any]], reads: int) -> None:
        """Two threads: changes of two caches over one pool, or a change beside attention over the same cache."""
        plans = [getattr(self, f"_{name}")(**arguments) for name, arguments in (first, second)]
        if plans[0].member is plans[1].member or any(plan.refused or plan.made for plan in plans):
            plans = plans[:1]
        if plans[0].made or (len(plans) > 1 and self._missing(plans) > plans[0].member.cache.table.free_pages):
            return
        member, faults, done = plans[0].member, [], []
        q = self.setting.queries(len(member.seqs), 1, reads)

        def guarded(call: Callable[[], Any]) -> None:
            try:
                call()
            except BaseException as error:
                faults.append(error)

        def look() -> None:
            for _ in range(1 + reads % 3):
                if len(member.seqs) == member.cache.batch:
                    member.cache.attend(q)
                member.cache.read(0)

        def change(plan: Plan) -> None:
            try:
                plan.change()
                done.append(plan)
            except Exception as error:
                if not self._may_end_with(plan, error):
                    raise

        calls = [partial(change, plan) for plan in plans] + [look] * (2 - len(plans))
        if len(plans) == 1 and plans[0].name == "select":
            calls = calls[:1]  # the batch would change under the queries
        switch = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(laws.PATIENCE)
        sys.setswitchinterval(switch)
        if any(thread.is_alive() for thread in threads):
            raise Finding("two threads wait for each other")
        if faults:
            raise Finding(f"in threads: {type(faults[0]).__name__}: {faults[0]}") from faults[0]
        for plan in done:
            self._accept(plan, None)
        self._check_all()

    def interrupted(self, name: str, arguments: dict[str, Any], at: float) -> None:
        """Interrupt a change at a share of its lines."""
        plan: Plan = getattr(self, f"_{name}")(**arguments)
        if plan.made != "another" or len(self.members) < MEMBERS:
            self.interrupt(plan, 1 + int(at * self._lines.get(name, FIRST_LINES)))

    # -- plans ---------------------------------------------------------------------------------------------------------

    def _member(self, which: int) -> Member:
        return self.members[which % len(self.members)]

    def _append(self, which: int, lengths: list[int], seed: int, kind: str, asked: bool = False) -> Plan:
        member = self._member(which)
        new = [lengths[seq % len(lengths)] for seq in range(len(member.seqs))]
        k, v = self.setting.tokens(len(new), max(new), seed, kind)
        given = None if len(set(new)) == 1 and seed % 2 else new
        queries = self.setting.queries(len(new), max(new), seed) if asked else None
        after = tuple(
            x.grown(k[seq, :, :n], v[seq, :, :n]) for seq, (x, n) in enumerate(zip(member.seqs, new, strict=True))
        )
        return Plan(
            "append",
            member,
            lambda: member.cache.append(k, v, lengths=given, queries=queries),
            after,
            frozenset(seq for seq, n in enumerate(new) if n),
            self._no_room(member, [x.tokens for x in after]),
        )

    def _no_room(self, member: Member, wanted: list[int]) -> type[Exception] | None:
        """The error that is due when sequences ask for so many tokens."""
        limit = self.setting.max_tokens
        if any(n // BLOCK > self.setting.max_pages or (limit is not None and n > limit) for n in wanted):
            return ValueError
        return RuntimeError if self._lacking(member, wanted) > member.cache.table.free_pages else None

    def _lacking(self, member: Member, wanted: list[int]) -> int:
        held = (member.cache.table.table >= 0).sum(1).tolist()
        return sum(max(0, n // BLOCK - own) for n, own in zip(wanted, held, strict=True))

    def _missing(self, plans: Iterable[Plan]) -> int:
        """Pages that plans for one pool ask for."""
        return sum(
            self._lacking(plan.member, [x.tokens for x in plan.after]) for plan in plans if plan.name != "select"
        )

    def _free(self, which: int, seq: int) -> Plan:
        member = self._member(which)
        seq %= len(member.seqs)
        after = self._with(member, seq, Sequence.empty(self.setting))
        return Plan("free", member, lambda: member.cache.free(seq), after, frozenset([seq]))

    def _with(self, member: Member, seq: int, sequence: Sequence) -> tuple[Sequence, ...]:
        return (*member.seqs[:seq], sequence, *member.seqs[seq + 1 :])

    def _fork(self, which: int, source: int, target: int) -> Plan:
        member = self._member(which)
        source, target = source % len(member.seqs), target % len(member.seqs)
        sources = [*range(len(member.seqs))]
        sources[target] = source
        after = self._copies(member, sources)
        refused = ValueError if source == target else None
        return Plan(
            "fork", member, lambda: member.cache.fork(source, target), after, frozenset([target]), refused,
            sources=tuple(sources),
        )  # fmt: skip

    def _copies(self, member: Member, sources: list[int]) -> tuple[Sequence, ...]:
        """The sequences of a cache in another order, or several times."""
        return tuple(member.seqs[seq].copied() if sources.count(seq) > 1 else member.seqs[seq] for seq in sources)

    def _truncate(self, which: int, seq: int, back: int) -> Plan:
        member = self._member(which)
        seq %= len(member.seqs)
        keep = member.seqs[seq].tokens - back % (member.seqs[seq].tokens + 1)
        held = None if self.setting.config.residual_share == 1 else member.cache.read(seq)
        after = self._with(member, seq, member.seqs[seq].cut(keep, held))
        return Plan("truncate", member, lambda: member.cache.truncate(seq, keep), after, frozenset([seq]))

    def _select(self, which: int, seqs: list[int]) -> Plan:
        member = self._member(which)
        seqs = [seq % len(member.seqs) for seq in seqs]
        touched = frozenset(range(len(member.seqs)))
        return Plan(
            "select",
            member,
            lambda: member.cache.select(seqs),
            self._copies(member, seqs),
            touched,
            sources=tuple(seqs),
        )

    def _reserve(self, which: int, tokens: int) -> Plan:
        member = self._member(which)
        refused = self._no_room(member, [x.tokens + tokens for x in member.seqs])
        return Plan("reserve", member, lambda: member.cache.reserve(tokens), member.seqs, refused=refused)

    def _branch(self, which: int) -> Plan:
        member = self._member(which)
        after = tuple(x.copied() for x in member.seqs)
        return Plan("branch", member, member.cache.branch, after, made="another")

    def _reload(self, which: int, more_pages: int) -> Plan:
        member = self._member(which)
        sharing = len({int(page) for seq in range(len(member.seqs)) for page in member.cache.table.pages(seq)})
        pages = max(self.setting.max_pages, sharing) + more_pages

        def change() -> PagedThriftCache:
            from safetensors.torch import load, save

            content = save({name: x.contiguous() for name, x in state.state_dict(member.cache).items()})
            made = self.setting.make(len(member.seqs), pages)
            state.load_state_dict(made, load(content))
            return made

        every = range(len(member.seqs))
        return Plan("reload", member, change, member.seqs, frozenset(every), made="instead", sources=tuple(every))

    # -- carrying them out ---------------------------------------------------------------------------------------------

    def _perform(self, plan: Plan) -> None:
        try:
            made = plan.change()
        except Exception as error:
            if not self._may_end_with(plan, error):
                raise Finding(f"{plan.name} ends with {type(error).__name__}: {error}") from error
            if not plan.member.cache.is_intact:
                raise Finding(f"{plan.name} was refused and has broken the cache: {error}") from error
        else:
            if plan.refused:
                raise Finding(f"{plan.name} is not refused")
            self._accept(plan, made)
        self._check_all()

    def _may_end_with(self, plan: Plan, error: Exception) -> bool:
        """Whether a change may be refused like this. Slots for residuals are enough for sequences that share nothing."""
        if plan.refused and isinstance(error, plan.refused):
            return True
        shared = self._leaky or any(x.shared for member in self.members for x in member.seqs)
        return shared and isinstance(error, RuntimeError) and "slots of residuals are exhausted" in str(error)

    def _accept(self, plan: Plan, made: PagedThriftCache | None) -> None:
        """Take note of a change that was made."""
        if plan.refused:
            return
        member = plan.member
        if plan.made == "another":
            assert made is not None
            self.members.append(Member(made, plan.after, list(member.pictures)))
            member.seqs = plan.after
            return
        if plan.made == "instead":
            assert made is not None
            member.cache = made
        else:
            quiet = [seq for seq in range(len(member.seqs)) if seq not in plan.touched]
            laws.check_left_alone(member, quiet, plan.name)
        for seq, source in enumerate(plan.sources or ()):
            if not same(picture(member.cache, seq), member.pictures[source]):
                raise Finding(f"after {plan.name} sequence {seq} is not what sequence {source} was")
        member.seqs = plan.after
        member.look()

    def interrupt(self, plan: Plan, at: int) -> bool:
        """Interrupt a change before its line ``at``; the cache must be right or say that it is not.

        Returns:
            Whether the change has such a line. Without one it is done.
        """
        try:
            made, lines = self._interrupter.run(plan.change, at)
        except KeyboardInterrupt:
            pass
        except Exception as error:
            if not self._may_end_with(plan, error):
                raise Finding(f"{plan.name} ends with {type(error).__name__}: {error}") from error
            self._check_all()
            return False
        else:
            self._lines[plan.name] = lines
            self._accept(plan, made)
            self._check_all()
            return False
        self.interrupts += 1
        self._leaky = True
        laws.check_lock(plan.member.cache)
        self._after_interrupt(plan, at)
        self._check_all()
        return True

    def _after_interrupt(self, plan: Plan, at: int) -> None:
        member = plan.member
        if not member.cache.is_intact:
            laws.check_refuses(member.cache, self.setting, plan.name)
            self._start_again(member)
            return
        for seqs in (member.seqs, member.seqs if plan.made else plan.after):
            if len(seqs) == member.cache.batch and all(as_fresh(member.cache, seq, x) for seq, x in enumerate(seqs)):
                member.seqs = seqs
                member.look()
                return
        raise Finding(f"{plan.name} interrupted at line {at}: the cache holds neither what it held nor what it should")

    def _start_again(self, member: Member) -> None:
        """Put all tokens into a new cache, with a pool of its own."""
        whole = sum(x.tokens // BLOCK for x in member.seqs)
        cache = self.setting.make(len(member.seqs), max(self.setting.num_pages, whole))
        for seq, x in enumerate(member.seqs):
            k, v = (part[None].expand(len(member.seqs), -1, -1, -1) for part in (x.k, x.v))
            cache.append(k, v, lengths=[x.tokens if at == seq else 0 for at in range(len(member.seqs))])
        member.cache = cache
        member.seqs = tuple(Sequence.empty(self.setting).grown(x.k, x.v) for x in member.seqs)
        member.look()

    def _check_all(self) -> None:
        """Books, pages, and everything that the last operation should have left alone."""
        name = self.log[-1][0] if self.log else "nothing"
        for member in self.members:
            laws.check_books(member)
            laws.check_left_alone(member, range(len(member.seqs)), name)
        laws.check_pools(self.members, self._leaky)
        laws.check_slots(self.members, self._leaky)
