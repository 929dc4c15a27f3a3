"""What a record must say about where its numbers come from: code, versions, machine."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import tempfile
import tokenize
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write several files that belong together, all of them or none; their folders are made.

    Every file is written beside its place and synced first, then all are moved. When a move fails, or is interrupted,
    the files that were moved before it get back what they held.

    Args:
        contents: bytes of each file, in the order in which they are moved: a file that names others comes last.
    """
    written: dict[Path, Path] = {}
    kept: dict[Path, Path | None] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            written[path] = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            written[path].chmod(0o666 & ~_umask())
        for path in [*contents][:-1]:  # the last one replaces what it finds in one step
            kept[path] = _second_name(path) if path.exists() else None
        for path, beside in written.items():
            os.replace(beside, path)
    except BaseException:
        for path, old in kept.items():
            if not written[path].exists():  # it was moved
                os.replace(old, path) if old is not None else path.unlink(missing_ok=True)
        raise
    finally:
        for leftover in (*written.values(), *filter(None, kept.values())):
            leftover.unlink(missing_ok=True)


def _umask() -> int:
    """Return the permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _second_name(path: Path) -> Path:
    """Give a file a second name beside it, so that what it holds outlives its replacement."""
    folder = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
    os.rmdir(folder)
    second = Path(f"{folder}.old")
    try:
        os.link(path, second)
    except OSError:  # a file system without hard links
        shutil.copy2(path, second)
    return second


def write_json(path: Path, content: Any, *, allow_nan: bool = True) -> None:
    """Write a JSON file whole or not at all; its folder is made.

    Raises:
        ValueError: ``content`` holds a NaN or an infinity and ``allow_nan`` is False.
    """
    write_files({path: (json.dumps(content, indent=1, allow_nan=allow_nan) + "\n").encode()})


def commit() -> str | None:
    """Commit of the checkout that this file is tracked in (``+`` when files were changed), else None.

    The environment variable THRIFT_COMMIT speaks for a copy of the tree without its history.
    """
    if os.environ.get("THRIFT_COMMIT"):
        return os.environ["THRIFT_COMMIT"]
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie in some other checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def digest_of_sources(package: Path, rooms: Iterable[str]) -> str:
    """Return the SHA-256 of the sources of some folders of a package, without imports, docstrings, comments and layout.

    Args:
        package: the folder of the package.
        rooms: names of folders in it.
    """
    total = hashlib.sha256()
    for room in rooms:
        for path in sorted((package / room).rglob("*.py")):
            total.update("\n".join([str(path.relative_to(package)), *_code(path.read_text(encoding="utf-8"))]).encode())
    return total.hexdigest()


def _code(text: str) -> list[str]:
    """The lines of a source without what says nothing of what it does."""
    lines = text.split("\n")
    rows = [line.encode() for line in lines]
    spans = []  # (row, column) where each begins and ends, columns in bytes
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom)):
            continue
        value = node.value if isinstance(node, ast.Expr) else None
        if value is None or (isinstance(value, ast.Constant) and isinstance(value.value, str)):
            spans.append((node.lineno, node.col_offset, node.end_lineno or node.lineno, node.end_col_offset or 0))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            (row, column), (_, end) = token.start, token.end
            before, comment = lines[row - 1][:column].encode(), lines[row - 1][column:end].encode()
            spans.append((row, len(before), row, len(before) + len(comment)))
    for first, start, last, end in sorted(spans, reverse=True):
        kept = rows[first - 1][:start] + rows[last - 1][end:]
        rows[first - 1 : last] = [kept, *[b""] * (last - first)]
    return [line for row in rows if (line := row.decode().rstrip()).strip()]


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of Python, this package, others by their distribution name, CUDA and cuDNN; None for what is absent."""
    from thrift_attn import __version__

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "python": platform.python_version(),
        "thrift-attn": __version__,
        **{package: version(package) for package in packages},
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


_TESTED = {"python": ("3.10", "3.12"), "torch": ("2.10", "2.13"), "triton": ("3.6", "3.9")}
"""Oldest and newest minor versions that the tests have run with (`make test`, `make test-matrix`, `make test-gpu`)."""


def tested_versions() -> dict[str, tuple[str, str]]:
    """Return the oldest and the newest minor version that the tests run with, by package.

    Those of transformers stand in `thrift_attn.transformers.versions`, which cannot be asked when it is absent or too old.
    """
    try:
        from thrift_attn.transformers.versions import SUPPORTED
    except ImportError:
        return dict(_TESTED)
    oldest, newest = (f"{major}.{minor}" for major, minor in SUPPORTED)
    return {**_TESTED, "transformers": (oldest, newest)}


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def machine() -> dict[str, Any]:
    """Processor, and the current CUDA device with its driver if there is one."""
    found: dict[str, Any] = {"cpu": platform.machine(), "cores": os.cpu_count(), "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            **gpu_state(),
        }
    return found


def gpu_state() -> dict[str, str]:
    """Driver, clocks, temperature and power as nvidia-smi reads them; empty without nvidia-smi."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip((name.replace(".", "_") for name in fields), map(str.strip, said.split(",")), strict=False))
