"""Frozen configuration of the method. Every option is checked here, once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any, Literal, TypeVar, get_args

BLOCK = 64
"""Tokens in a KV block, the unit of selection, centring and paging (paper section 3)."""

DECODE_ROWS = 16
"""Largest number of new tokens that is treated as decode: one list of promoted blocks per KV head."""

MAX_BLOCKS = 2**31 - 1
"""Largest number of blocks that an option may name; what a call can hold is far less."""

BaseFormat = Literal["nvfp4", "mxfp4", "fp8", "drop"]
AskedFormat = Literal["auto", BaseFormat]
Compute = Literal["fp4", "16bit"]
Center = Literal["none", "block", "all"]
SinkToken = Literal["none", "exact"]
Smooth = Literal["none", "channel"]
Normalize = Literal["exact", "rounded"]
Scales = Literal["max", "best"]
Score = str
"""Name of a row of `thrift_attn.reference.scores.SCORES`."""

PromotedStorage = Literal["16bit", "nested", "nested8"]
Backend = Literal["auto", "reference", "triton"]
Layout = Literal["BHTD", "BTHD"]
"""Order of the dimensions of q, k and v: batch, heads, tokens, head dim; or flash-attention's."""

_Config = TypeVar("_Config")

BudgetKind = Literal["fraction", "top_k", "paper", "floored"]


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError unless ``value`` is one of a Literal's ``choices``."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_config(config: object, name: str = "config") -> None:
    """Raise TypeError for anything else than a ThriftConfig."""
    if not isinstance(config, ThriftConfig):
        raise TypeError(f"{name} must be a ThriftConfig, got {type(config).__name__}")


@dataclass(frozen=True)
class Budget:
    """How many KV blocks of each query row are promoted to high precision.

    Use the constructors `fraction`, `floored`, `top_k` and `paper`.

    Args:
        kind: ``"fraction"``, ``"floored"``, ``"top_k"`` or ``"paper"``.
        value: the share in [0, 1] for ``fraction`` and ``floored``; the whole number of blocks for ``top_k``; unused (0) for
            ``paper``.
        blocks: the least blocks of a row for ``floored``; unused (0) for the others.

    Raises:
        TypeError: a value that is not a number.
        ValueError: an unknown kind, or a value out of range (NaN included).

    Source: paper section 3 (floor(N/64) rule and share of blocks).
    """

    kind: BudgetKind
    value: float = 0.0
    blocks: int = 0

    def __post_init__(self) -> None:
        check_choice("budget kind", self.kind, BudgetKind)
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise TypeError(f"budget value must be a number, got {type(self.value).__name__}")
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int):
            raise TypeError(f"blocks of a budget must be an int, got {type(self.blocks).__name__}")
        if self.kind in ("fraction", "floored") and not 0.0 <= self.value <= 1.0:
            raise ValueError(f"budget fraction must be in [0, 1], got {self.value!r}")
        if self.kind == "floored" and not 1 <= self.blocks <= MAX_BLOCKS:
            raise ValueError(
                f"the floor of a budget must be at least 1 and at most {MAX_BLOCKS} blocks, got {self.blocks}"
            )
        if self.kind != "floored" and self.blocks != 0:
            raise ValueError(f"only a floored budget has least blocks, got {self.blocks} with kind {self.kind!r}")
        if self.kind == "top_k" and not (0 <= self.value <= MAX_BLOCKS and float(self.value).is_integer()):
            raise ValueError(f"budget top_k must be a whole number >= 0 and at most {MAX_BLOCKS}, got {self.value!r}")
        if self.kind == "paper" and self.value != 0:
            raise ValueError(f"the paper's budget rule takes no value, got {self.value!r}")

    def __str__(self) -> str:
        if self.kind == "paper":
            return "paper"
        if self.kind == "top_k":
            return f"top_k({int(self.value)})"
        short = f"{self.value:g}"
        share = short if float(short) == self.value else repr(float(self.value))
        return f"max({share}, {self.blocks})" if self.kind == "floored" else share

    @classmethod
    def paper_rule(cls) -> Budget:
        """The paper's rule: clamp(floor(N / 64), 1, N) blocks per query row, N the number of KV blocks."""
        return cls("paper")

    @classmethod
    def of(cls, value: Budget | float | str) -> Budget:
        """Return a budget from a share such as 0.05, from text (`parse`), or a budget as it is.

        Raises:
            TypeError: a value of another type.
            ValueError: text of another form, or a value out of range.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                "budget must be a Budget such as top_k(8), a share such as 0.05, or text such as '5%', "
                f"got {type(value).__name__}"
            )
        return fraction(value)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Budget from text: ``0.05``, ``5%``, ``max(5%, 16)`` (`floored`), ``top_k(8)`` or ``paper``.

        Raises:
            ValueError: text of another form, or a value out of range.
        """
        text = text.strip()
        if text == "paper":
            return cls.paper_rule()
        try:
            if text.startswith("top_k(") and text.endswith(")"):
                return top_k(int(text[6:-1]))
            if text.startswith("max(") and text.endswith(")"):
                share, _, blocks = text[4:-1].partition(",")
                return floored(_share(share.strip()), int(blocks))
            return fraction(_share(text))
        except (ValueError, ArithmeticError) as error:
            raise ValueError(
                f"budget must be a share like 0.05 or 5%, max(5%, 16), top_k(8), or paper; got {text!r}"
            ) from error


def _share(text: str) -> float:
    """Return ``0.05`` or ``5%`` as a number."""
    return float(Decimal(text[:-1]).scaleb(-2) if text.endswith("%") else text)


def fraction(share: float) -> Budget:
    """Promote this share of the visible (query block, KV block) pairs; 1 is exact attention, 0 pure low precision."""
    return Budget("fraction", share)


def floored(share: float, blocks: int) -> Budget:
    """Promote this share of the visible pairs, but at least so many blocks of a row, or all that it sees.

    Short rows, of whose few blocks a share is none, are exact; where the share alone gives more, it is `fraction`.
    """
    return Budget("floored", share, blocks)


def top_k(blocks: int) -> Budget:
    """Promote this many KV blocks per query row."""
    return Budget("top_k", blocks)


def paper() -> Budget:
    """The paper's rule: clamp(floor(N / 64), 1, N) blocks per query row, N the number of KV blocks."""
    return Budget("paper")


OLD_NAMES = {
    "low": "base_format",
    "math": "compute",
    "high": "promoted_storage",
    "total": "normalize",
    "balance": "smooth",
    "sink": "sink_token",
}
"""Names of options up to version 0.1, accepted for one version with a DeprecationWarning, and in records for ever."""


def current_names(options: dict[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Return options of a ThriftConfig under their current names.

    Args:
        options: by current or old name (`OLD_NAMES`); ``sink="token"`` becomes ``sink_token="exact"``.
        warn: whether an old name gives a DeprecationWarning; False for records, which stay readable.

    Raises:
        TypeError: an option that is given under both of its names.
    """
    current = {}
    for name, value in options.items():
        new = OLD_NAMES.get(name, name)
        if new in current or (new != name and new in options):
            raise TypeError(f"{new} is given twice: its old name is {name}")
        if new != name and warn:
            warnings.warn(f"ThriftConfig: {name}= is now {new}=", DeprecationWarning, stacklevel=3)
        current[new] = "exact" if (name, value) == ("sink", "token") else value
    return current


def _accept_old_names(cls: type[_Config]) -> type[_Config]:
    """Let a configuration be made, and read, by the old names of its options."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, **options: Any) -> None:
        init(self, **current_names(options))

    def reader(old: str, new: str) -> property:
        def read(self: Any) -> Any:
            warnings.warn(f"ThriftConfig.{old} is now {new}", DeprecationWarning, stacklevel=2)
            return getattr(self, new)

        return property(read, doc=f"The old name of ``{new}``.")

    cls.__init__ = __init__
    for old, new in OLD_NAMES.items():
        setattr(cls, old, reader(old, new))
    return cls


_scores: Mapping[str, object] = {}


def use_scores(table: Mapping[str, object]) -> None:
    """Let ``score=`` be any key of ``table``. `thrift_attn.reference.scores` hands in its table when it is imported."""
    global _scores
    _scores = table


_CHOICES = {
    "base_format": AskedFormat,
    "compute": Compute,
    "center": Center,
    "sink_token": SinkToken,
    "smooth": Smooth,
    "scales": Scales,
    "normalize": Normalize,
    "promoted_storage": PromotedStorage,
}


class _BudgetOption:
    """The field ``budget`` of `ThriftConfig`: set with what `Budget.of` takes, read as a `Budget`. Type checkers know both."""

    def __get__(self, config: ThriftConfig | None, owner: type) -> Budget:
        return floored(0.05, blocks=16) if config is None else config.__dict__["budget"]

    def __set__(self, config: ThriftConfig, value: Budget | float | str) -> None:
        config.__dict__["budget"] = Budget.of(value)


@_accept_old_names
@dataclass(frozen=True, kw_only=True)
class ThriftConfig:
    """What is computed: formats, arithmetic, centring, selection, storage of the high-precision plane.

    Args:
        base_format: format of the low-precision path, ``"nvfp4"``, ``"mxfp4"`` or ``"fp8"``; ``"drop"`` leaves the blocks out
            that are not promoted, which turns the method into the sparse baselines. ``"auto"`` is what a device is fast at
            (`thrift_attn.dispatch.AUTO_FORMATS`): nvfp4 on Blackwell, fp8 on Ada and Hopper, exact 16-bit attention on other
            GPUs; nvfp4 on a CPU, in caches, and with ``compute="16bit"`` or a nested ``promoted_storage``.
        compute: ``"fp4"`` quantises Q and P in the low format as well (what low-precision tensor cores do);
            ``"16bit"`` widens K and V and multiplies with the given Q and P.
        center: ``"block"`` quantises K minus the mean of its KV block and adds q.c_b in high precision; ``"all"`` also
            quantises Q minus its mean over the call and adds what that mean makes of each key, where more than 16 queries
            are quantised to 4 bits (elsewhere it is ``"block"``); ``"none"`` does neither.
        sink_token: ``"exact"`` attends to the first token of a sequence, the attention sink, exactly and outside of the budget,
            whether its block is promoted or not: its key is the centre of its block, so that the others are quantised less
            of it, its value is in no group, and its block is scored by the mean of its other tokens. Needs centred K.
            ``"none"`` makes it a token like the others.
        smooth: ``"channel"`` multiplies what is quantised to 4 bits by powers of two, taken from a sample of the call or from
            the first block of a cached sequence: outlier channels of K come near the others (Q is divided by the same), K and V
            to a size that the scales hold; ``"none"`` does not.
        scales: ``"max"`` derives every group scale from the group maximum as the format defines it; ``"best"`` also tries
            the format's other tops (for nvfp4: Four Over Six) when K, V, Q and residuals are quantised, and keeps the scale
            with the smaller squared error. Costs time when data are packed, none when they are read.
        normalize: where P is quantised to 4 bits, the output is divided by its sum before (``"exact"``) or after rounding
            (``"rounded"``, weights then sum to one). The LSE is that of P before rounding.
        budget: how many blocks are promoted: a `floored`, `fraction`, `top_k` or `paper` budget, a share such as 0.05, or
            text such as ``"5%"``. By default 5%, but at least 16 blocks of a row, so that up to 1,024 tokens all of them
            are; a bare share has no floor.
        score: which blocks are promoted: ``"mean"`` (mean(Q_i).c_b), ``"quest"`` (min/max bound), ``"local"`` (nearest
            blocks to the query's own), ``"oracle"`` (true attention mass), ``"fp4"`` (attention mass by 4-bit logits).
        force_first: this many first blocks come before all others inside the budget; without an exact sink the first one is
            worth it.
        force_last: this many blocks come next, those nearest to the query's own, that one included; under a causal mask these
            are the last visible ones.
        exact_below: sequences of fewer keys than this, or with fewer than a twelfth as many queries, are attended exactly, with
            every block promoted or by a kernel for 16-bit attention, since quantising them would not pay. None: what has
            been measured for ``base_format="auto"`` and the GPU at hand (`thrift_attn.crossovers`), and 0 for a format that
            is named. 0 is never: quality is measured so. Of `thrift_attn.attention` alone, not of caches.
        promoted_storage: how promoted blocks are stored: ``"16bit"`` copy, ``"nested"`` (nvfp4 residual of the base) or
            ``"nested8"`` (e4m3 residual with group scales).
        residual_share: in a cache, the share of a sequence's blocks that keep what promoted blocks are stored as, for each KV
            head: the newest, and those that attention has favoured (`thrift_attn.reference.residents`). The others are read
            in 4 bits. At least 32 blocks and as many as the budget promotes keep it; 1 is all, 0 none.

    Raises:
        ValueError: an unknown choice, a value out of range or a combination that has no meaning.
        TypeError: a value of the wrong type.

    Source: arXiv 2605.23081; centring and nested planes: docs/method.md.
    """

    base_format: AskedFormat = "auto"
    compute: Compute = "fp4"
    center: Center = "all"
    sink_token: SinkToken = "exact"
    smooth: Smooth = "channel"
    scales: Scales = "best"
    normalize: Normalize = "rounded"
    budget: _BudgetOption = _BudgetOption()
    score: Score = "mean"
    force_first: int = 0
    force_last: int = 1
    promoted_storage: PromotedStorage = "16bit"
    exact_below: int | None = None
    residual_share: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if self.score not in _scores:
            raise ValueError(f"score must be one of {', '.join(map(repr, _scores))}, got {self.score!r}")
        for name in ("force_first", "force_last", "exact_below"):
            value = getattr(self, name)
            if name == "exact_below" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if not 0 <= value <= MAX_BLOCKS:
                raise ValueError(f"{name} must be >= 0 and at most {MAX_BLOCKS}, got {value}")
        if isinstance(self.residual_share, bool) or not isinstance(self.residual_share, (int, float)):
            raise TypeError(f"residual_share must be a number, got {type(self.residual_share).__name__}")
        if not 0.0 <= self.residual_share <= 1.0:
            raise ValueError(f"residual_share must be in [0, 1], got {self.residual_share!r}")
        if self.exact_below and self.promoted_storage != "16bit":
            raise ValueError(
                f"exact_below needs promoted_storage='16bit': planes are not exact, got {self.promoted_storage!r}"
            )
        if self.base_format == "drop" and (self.center, self.scales, self.promoted_storage) != ("none", "max", "16bit"):
            raise ValueError(
                "base_format='drop' quantises nothing: it needs center='none', scales='max' and promoted_storage='16bit'"
            )
        if self.base_format == "drop" and (self.smooth, self.normalize, self.sink_token) != ("none", "exact", "none"):
            raise ValueError(
                "base_format='drop' quantises nothing: it needs smooth='none', normalize='exact' and sink_token='none'"
            )
        if self.sink_token == "exact" and self.center == "none":
            raise ValueError(
                "sink_token='exact' is the centre of its block: it needs center='block' or 'all', got center='none'"
            )

    @classmethod
    def paper(cls, **changes: Any) -> ThriftConfig:
        """The paper's form: nvfp4, scales from maxima, no centring, block-mean score, nothing forced, 5%, 16-bit copy."""
        plain = {"base_format": "nvfp4", "center": "none", "sink_token": "none", "smooth": "none", "scales": "max"}
        plain |= {"normalize": "exact", "budget": fraction(0.05), "force_first": 0, "force_last": 0}
        return cls(**{**plain, **current_names(changes)})

    @classmethod
    def for_cache(cls, **changes: Any) -> ThriftConfig:
        """The form of a KV cache: a 4-bit base and a nested residual; Q and P stay in 16 bits, since reading is what
        takes time."""
        return cls(
            **{"base_format": "nvfp4", "compute": "16bit", "promoted_storage": "nested", **current_names(changes)}
        )

    @classmethod
    def sparse(cls, score: Score, **changes: Any) -> ThriftConfig:
        """A baseline that drops the blocks that are not chosen: ``quest``, ``oracle`` (sparse top-k) or ``local``."""
        form = {"base_format": "drop", "center": "none", "sink_token": "none", "smooth": "none", "scales": "max"}
        form |= {"normalize": "exact", "budget": fraction(0.05), "force_first": 1, "score": score}
        return cls(**{**form, **current_names(changes)})

    def with_(self, **changes: Any) -> ThriftConfig:
        """A copy with some options changed, checked again."""
        return replace(self, **current_names(changes))

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values; the budget as the text that `Budget.parse` reads."""
        return {**asdict(self), "budget": str(self.budget)}
