"""The base of every record: what was measured and where it came from, as one JSON file, written whole or not at all.

A record names its ``kind`` and its ``schema`` and holds a ``context`` (commit, versions, machine, settings). Arrays that are
too large for JSON lie in one ``.npz`` file beside it, whose digest the record knows: a pair of different runs is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from thrift_lab.provenance import commit, machine, now, versions, write_files
from thrift_lab.sheet import Sheet

Arrays = dict[str, "np.ndarray[Any, Any]"]

MARK = "†"
"""Behind the name of what was recorded under an older default."""

NUMERICS_SINCE = "2026-11-26"
"""Day since which the first token is exact, as it is now; records of kernels do not keep their options."""

OLDER = "recorded before the first token was exact, which today's default has"
"""What `MARK` stands for in charts and tables of kernels."""


def before_today(created: str) -> bool:
    """Whether a record of kernels is older than what `thrift` means now.

    Args:
        created: when it was made, ISO 8601.
    """
    return created[:10] < NUMERICS_SINCE


class Record(BaseModel):
    """What a run leaves behind.

    Args:
        context: machine, versions, commit, settings, as `make_context` gives them.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, ser_json_inf_nan="constants")

    KINDS: ClassVar[tuple[str, ...]] = ()
    """Kinds that a file of this class may name: the default of `kind`, or what a class of several says itself."""

    SCHEMA: ClassVar[int] = 1

    kind: str
    context: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        kind = cls.model_fields["kind"]
        if "KINDS" not in vars(cls) and not kind.is_required():
            cls.KINDS = (kind.default,)

    @classmethod
    def from_json(cls, found: dict[str, Any], path: Path) -> Self:
        """Make a record from the content of its file; subclasses rename what older files call otherwise.

        Args:
            found: what the file holds, without ``schema``.
            path: of the file, for what lies beside it.
        """
        return cls.model_validate(found)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values, ``kind``, ``schema`` and what `summary` has to say first."""
        content = self.model_dump(mode="json", by_alias=True)
        summary = self.summary()
        first = {} if summary is None else {"summary": summary}
        return {"kind": content.pop("kind"), "schema": self.SCHEMA, **first, **content}

    def summary(self) -> Any:
        """What the rows come to, as plain JSON values: for whoever opens the file, not read back. None: nothing."""
        return None

    def table(self) -> Sheet:
        """Return what was found, for people.

        Raises:
            NotImplementedError: a class that has no table.
        """
        raise NotImplementedError(f"records of kind {self.kind!r} have no table as text")

    def markdown(self) -> str:
        """Return the same as Markdown."""
        return self.table().markdown()

    def save(self, path: Path) -> None:
        """Write the JSON file whole or not at all; its folder is made.

        Raises:
            ValueError: a kind that this class does not have.
        """
        self._write(path, {})

    def _write(self, path: Path, beside: dict[Path, bytes]) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)}, got {self.kind!r}")
        text = json.dumps(self.to_json(), indent=1) + "\n"
        write_files({**beside, path: text.encode()})  # the record comes last: it names the others

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote, now or in an older version.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, an unknown schema, or a file that is damaged.
        """
        found = read_json(path)
        if not isinstance(found, dict) or found.get("kind") not in cls.KINDS or found.get("schema") != cls.SCHEMA:
            names = ("kind", "schema")
            got = ", ".join(f"{name} {found.get(name)}" for name in names) if isinstance(found, dict) else "no object"
            raise ValueError(
                f"{path} is not a record of kind {' or '.join(cls.KINDS)} and schema {cls.SCHEMA}, got {got}"
            )
        del found["schema"]
        try:
            return cls.from_json(found, path)
        except (ValidationError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {explain(error)}") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else than JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def kind_of(path: Path) -> str | None:
    """Return the kind that a JSON file says it is of; None where it says nothing, or is no JSON.

    Raises:
        FileNotFoundError: no such file.
    """
    try:
        found = read_json(path)
    except ValueError:
        return None
    return found.get("kind") if isinstance(found, dict) else None


def explain(error: Exception) -> str:
    """Return one line about an error of validation: the first place and what is wrong there."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}{more}"
    return f"{type(error).__name__}: {error}"


def pack_arrays(arrays: Arrays) -> bytes:
    """Return the bytes of a compressed ``.npz`` file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def digest(content: bytes) -> str:
    """Return the hex sha256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def load_arrays(path: Path, sha256: str | None) -> Arrays:
    """Return the arrays of a ``.npz`` file that belongs to a record.

    Args:
        path: of the file.
        sha256: what the record says about it; None for records that do not know.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another run, or one that is damaged.
    """
    content = path.read_bytes()
    if sha256 is not None and digest(content) != sha256:
        raise ValueError(f"{path} is not the file that its record was written with: run it again")
    try:
        with np.load(io.BytesIO(content)) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile, zlib and numpy have no common base class for a damaged file
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def make_context(packages: Iterable[str], **more: Any) -> dict[str, Any]:
    """Return everything needed to know what was measured.

    Args:
        packages: distributions whose versions count.
        **more: what else belongs to the context, such as ``settings``.
    """
    return {"created": now(), "commit": commit(), "machine": machine(), "versions": versions(packages), **more}
