"""The distribution: built from the tree, whole, and rendered by a package index; and extras that say all that is imported."""

from __future__ import annotations

import ast
import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import thrift_attn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution, and nothing else."""
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--sdist",
        "--wheel",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def test_an_index_renders_it(built: Path) -> None:
    files = sorted(map(str, built.iterdir()))
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_what_the_wheel_says_of_itself(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(next(n for n in names if n.endswith("METADATA"))))
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"thrift_attn", "thrift_lab"}
    assert "thrift_attn/py.typed" in names
    assert metadata["Version"] == thrift_attn.__version__
    assert metadata["Author"] == "The thrift-attn maintainers"
    assert metadata.get_all("Project-URL")
    text = str(metadata.get_payload())
    assert "<picture>" not in text
    assert re.findall(r"\]\((?!https?:)[^)]*\)", text) == []
    assert "The largest model with quality numbers" in text


def test_the_source_distribution_is_whole(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("src", "tests", "docs", "examples", "notebooks", "benchmarks")
    here = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()} | set(ROOT.glob("*.*"))
    wanted = {
        path.relative_to(ROOT).as_posix() for path in here if path.suffix in KEPT and "__pycache__" not in path.parts
    }
    assert wanted - names - {"docs/report.html"} == set()
    assert {"LICENSE", "Makefile"} <= names


KEPT = {".py", ".md", ".json", ".jsonl", ".svg", ".png", ".css", ".txt", ".toml", ".yml", ".cff", ".ipynb"}
"""What is in a source distribution; losses of single tokens (.npz), 20 MB, are not."""

BROUGHT = {
    "huggingface_hub": "transformers", "safetensors": "transformers", "tokenizers": "transformers", "numpy": "transformers",
    "typing_extensions": "torch", "click": "typer", "mkdocs": "mkdocs-material",
}  # fmt: skip
"""Modules that come with another package."""

NAMED = {"lm_eval": "lm-eval"}
PROBED = {
    "sageattention",
    "flash_attn",
    "flashinfer",
    "fa3_fwd",
    "fa3_fwd_interface",
    "flash_attn_interface",
    "tvm_ffi",
}
"""Packages that are used where they are installed, and never needed."""


def test_extras_name_what_is_imported() -> None:
    """Every package that the source imports is a dependency of some extra, or comes with one."""
    declared = {
        re.split(r"[\[<>=;~ ]", text)[0].lower().replace("_", "-")
        for text in re.findall(
            r'^\s+"([\w.-]+.*)",?$|\["(\w[^"]*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE
        )
        for text in text
        if text
    }
    lacking = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names):
                package = BROUGHT.get(name, NAMED.get(name, name)).replace("_", "-")
                if name not in PROBED | {"thrift_attn", "thrift_lab"} and package not in declared:
                    lacking.add(name)
    assert lacking == set()
