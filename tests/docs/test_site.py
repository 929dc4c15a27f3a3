"""The site builds without a warning, and has a section for every command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thrift_lab.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in start, page.name


def test_every_command_has_a_section(site: Path) -> None:
    page = (site / "cli.html").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert {"demo", "doctor", "generate"} <= set(names)
    for name in names:
        assert f'id="thrift-{name}"' in page
    assert 'id="thrift-eval-nll"' in page
    assert "--budget" in page


def test_links_to_records_lead_to_them(site: Path) -> None:
    assert (site / "benchmarks/results/h100/decode/target.json").read_bytes() == (
        ROOT / "benchmarks/results/h100/decode/target.json"
    ).read_bytes()
    assert 'href="benchmarks/results/h100/decode/target.json"' in (site / "decode.html").read_text()


def test_the_reference_shows_parameters(site: Path) -> None:
    page = (site / "api.html").read_text()
    assert 'id="thrift_attn.attention"' in page
    assert "Right-aligned" in page or "right-aligned" in page
    assert 'id="thrift_attn.cache.PagedThriftCache.append"' in page
