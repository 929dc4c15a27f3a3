"""Languages and kinds of text: a book in 26 languages, source code, and texts that are made, from a seed.

    handbook:LANGUAGE   the Debian handbook (Debian's package, pinned by its sha256), HTML as text, pages in alphabetical order
    source              the standard library of this Python, modules in alphabetical order
    made:mathematics    sums worked out step by step, equations and polynomials
    made:tables         tables with separators, one after the other
    made:logs           lines of a log with times, hosts and identifiers

A made text is the same on every machine. `write` puts texts into files for machines without a network.
"""

from __future__ import annotations

import io
import random
import re
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

from thrift_lab.assets import Asset, retrieve
from thrift_lab.console import Log, silent

HANDBOOK = Asset(
    name="debian-handbook",
    filename="debian-handbook_11.20220922_all.deb",
    sha256="3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    url="http://deb.debian.org/debian/pool/main/d/debian-handbook/debian-handbook_11.20220922_all.deb",
    megabytes=35,
)
"""The Debian Administrator's Handbook, GPL-2+ or CC-BY-SA-3.0."""

LANGUAGES = (
    "ar-MA", "ca-ES", "cs-CZ", "da-DK", "de-DE", "el-GR", "en-US", "es-ES", "fa-IR", "fr-FR", "hr-HR", "id-ID", "it-IT",
    "ja-JP", "ko-KR", "nb-NO", "nl-NL", "pl-PL", "pt-BR", "ro-RO", "ru-RU", "sv-SE", "tr-TR", "vi-VN", "zh-CN", "zh-TW",
)  # fmt: skip
"""Of the handbook; some are translated in part only."""

SEED = 19
_CHARACTERS = 2_000_000  # of a made text


class _Text(HTMLParser):
    """The text of a page of the handbook, without its banner and its links to other pages."""

    _SKIPPED = ("head", "script", "style")
    _ENDS = ("div", "p", "li", "h1", "h2", "h3", "h4", "h5", "pre", "tr", "dt", "dd")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.skipping = 0
        self.open: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        skip = tag in self._SKIPPED or "docnav" in (given.get("class") or "") or given.get("id") in ("banner", "title")
        if tag not in ("br", "img", "meta", "link", "hr"):
            self.open.append((tag, skip))
            self.skipping += skip
        if tag == "br":
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        while self.open:
            name, skip = self.open.pop()
            self.skipping -= skip
            if name == tag:
                break
        if tag in self._ENDS and not self.skipping:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            preformatted = any(tag == "pre" for tag, _ in self.open)
            self.pieces.append(data if preformatted else re.sub(r"\s+", " ", data))


def page_text(html: str) -> str:
    """Text of an HTML page of the handbook, paragraphs on lines of their own."""
    parser = _Text()
    parser.feed(html)
    lines = [line.rstrip() for line in "".join(parser.pieces).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if line.strip() or not line)).strip()


def _members(package: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the pages in a Debian package (an ``ar`` archive that holds a tar)."""
    content = package.read_bytes()
    at = 8
    while at < len(content):
        name, size = content[at : at + 16].decode().strip(), int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[at + 60 : at + 60 + size])) as tar:
                for member in tar:
                    if member.isfile() and member.name.endswith(".html"):
                        file = tar.extractfile(member)
                        assert file is not None
                        yield member.name, file.read()
        at += 60 + size + size % 2


@lru_cache(maxsize=1)
def _pages(package: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Pages of the book by language, in alphabetical order."""
    pages: dict[str, list[tuple[str, bytes]]] = {}
    for name, content in _members(package):
        *_, language, page = name.split("/")
        if language in LANGUAGES and page != "index.html":
            pages.setdefault(language, []).append((page, content))
    return {language: sorted(found) for language, found in pages.items()}


def translated(text: str, english: str) -> str:
    """The text without its lines that the English text has as well and that are no commands: those not yet translated."""
    same = {line for line in english.split("\n") if len(line.split()) > 5}
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in text.split("\n") if line not in same)).strip()


def handbook(language: str, log: Log = silent) -> str:
    """The handbook in a language, what is not translated left out.

    Raises:
        ValueError: a language that it does not have.
        FetchError: the package cannot be had.
    """
    if language not in LANGUAGES:
        raise ValueError(f"the handbook has no language {language!r}: there are {', '.join(LANGUAGES)}")
    pages = _pages(retrieve(HANDBOOK, None, log))
    text, english = (
        "\n\n".join(page_text(page.decode("utf-8")) for _, page in pages[name]) for name in (language, "en-US")
    )
    return text if language == "en-US" else translated(text, english)


def source() -> str:
    """Source of the standard library of this Python: top-level modules in alphabetical order."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
    return "\n\n".join(path.read_text(encoding="utf-8") for path in files)


def _mathematics(dice: random.Random) -> str:
    a, b, c = (dice.randrange(2, 10 ** dice.randrange(1, 5)) for _ in range(3))
    kind = dice.randrange(4)
    if kind == 0:
        return f"{a} * {b} + {c} = {a * b} + {c} = {a * b + c}\n"
    if kind == 1:
        return f"Solve {a} x + {b} = {a * c + b}: {a} x = {a * c}, so x = {c}.\n"
    if kind == 2:
        r, s = a % 30, b % 30
        return f"(x - {r})(x - {s}) = x^2 - {r + s} x + {r * s}; its roots are {r} and {s}.\n"
    return f"\\int_0^{{{a}}} {2 * b} t \\, dt = {b} \\cdot {a}^2 = {b * a * a}\n"


def _table(dice: random.Random) -> str:
    columns = dice.randrange(3, 7)
    heads = dice.sample(["id", "name", "city", "year", "count", "share", "price", "grade", "code"], columns)
    names = ["Ada", "Boole", "Curie", "Darwin", "Euler", "Fermat", "Gauss", "Hopper"]
    cities = ["Oslo", "Lima", "Cairo", "Delhi", "Quito", "Kyoto", "Accra", "Turin"]

    def cell(head: str, row: int) -> str:
        made = {
            "id": str(row),
            "name": dice.choice(names),
            "city": dice.choice(cities),
            "year": str(dice.randrange(1900, 2030)),
        }
        made |= {
            "count": str(dice.randrange(10**4)),
            "share": f"{dice.random():.3f}",
            "price": f"{dice.random() * 1000:.2f}",
        }
        return {**made, "grade": dice.choice("ABCDE"), "code": f"{dice.randrange(16**6):06x}"}[head]

    rows = [[cell(head, row) for head in heads] for row in range(dice.randrange(5, 40))]
    return "".join(" | ".join(line) + "\n" for line in [heads, ["---"] * columns, *rows]) + "\n"


def _log(dice: random.Random) -> str:
    day = f"2026-{dice.randrange(1, 13):02}-{dice.randrange(1, 29):02}"
    at = f"{day}T{dice.randrange(24):02}:{dice.randrange(60):02}:{dice.randrange(60):02}Z"
    host, request = f"node-{dice.randrange(40):02}", f"{dice.randrange(16**8):08x}"
    level = dice.choice(["INFO"] * 6 + ["WARN"] * 2 + ["ERROR"])
    what = dice.choice(
        [
            f"GET /items/{dice.randrange(10**5)} 200 {dice.randrange(900)}ms",
            f"worker {dice.randrange(16)} took {dice.randrange(64)} jobs, {dice.randrange(10**4)} left",
            f"connection from 10.0.{dice.randrange(256)}.{dice.randrange(256)}:{dice.randrange(1024, 65536)} closed",
            f"retry {dice.randrange(1, 6)} of 5: timeout after {dice.randrange(1, 31)} s",
        ]
    )
    return f"{at} {host} [{request}] {level} {what}\n"


_MAKERS: dict[str, Callable[[random.Random], str]] = {"mathematics": _mathematics, "tables": _table, "logs": _log}

TEXT_KINDS = (*(f"handbook:{language}" for language in LANGUAGES), "source", *(f"made:{name}" for name in _MAKERS))
"""Every text that `kind` makes."""


def made(name: str, characters: int = _CHARACTERS) -> str:
    """A text that is made, of at least so many characters, the same on every machine.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _MAKERS:
        raise ValueError(f"no text is made by the name {name!r}: there are {', '.join(_MAKERS)}")
    dice, pieces, size = random.Random(f"{SEED} {name}"), [], 0
    while size < characters:
        pieces.append(_MAKERS[name](dice))
        size += len(pieces[-1])
    return "".join(pieces)


def kind(spec: str, log: Log = silent) -> str | None:
    """The text that a spec of this module names; None for another spec.

    Raises:
        ValueError, FetchError: see `handbook` and `made`.
    """
    if spec.startswith("handbook:"):
        return handbook(spec.removeprefix("handbook:"), log)
    if spec.startswith("made:"):
        return made(spec.removeprefix("made:"))
    return source() if spec == "source" else None


def write(folder: Path, specs: tuple[str, ...] = TEXT_KINDS, log: Log = silent) -> list[Path]:
    """Write texts as files, one for each spec, and return their paths: ``handbook-de-DE.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for spec in specs:
        text = kind(spec, log)
        if text is None:
            raise ValueError(f"no kind of text {spec!r}: there are {', '.join(TEXT_KINDS)}")
        paths.append(folder / f"{spec.replace(':', '-')}.txt")
        paths[-1].write_text(text, encoding="utf-8")
    return paths
