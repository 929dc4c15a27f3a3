"""Every block of Python in the README and the docs runs as pasted, and prints what the block after it shows.

The blocks of a page run from top to bottom in one namespace, each page in a folder of its own. A local folder stands in
for the model of the hub.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from support.small_model import small_model
from thrift_lab.handbook.code_blocks import HUB_ID, Block, blocks, same
from thrift_lab.install_tests import CASES

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): found
    for path in (
        ROOT / "README.md",
        ROOT / "DESIGN.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if (found := blocks(path))
}


def run(block: Block, page: str, names: dict[str, Any]) -> str:
    """Run a block and return what it printed; blocks with prompts are compared by doctest itself."""
    if block.code.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.code, names, page, page, block.line)
        told = io.StringIO()
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        failed = runner.run(test, out=told.write, clear_globs=False).failed
        names.update(test.globs)
        assert not failed, told.getvalue()
        return ""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for block in PAGES[page]:
            if HUB_ID in block.code:
                block = Block(block.line, block.code.replace(HUB_ID, str(small_model())), block.output)
            got = run(block, page, names)
            if block.output is not None:
                assert same(got, block.output), f"{page}:{block.line} prints\n{got}\nand shows\n{block.output}"


def test_the_readme_shows_what_its_code_prints() -> None:
    shown = PAGES["README.md"]
    assert len(shown) == 2
    assert all(block.output for block in shown)


@pytest.mark.parametrize(
    ("got", "want", "close"),
    [("a 0.56 b", "a 0.55 b", True), ("a 0.56", "a 0.53", False), ("a 7", "a 8", False), ("a 1 b", "a 1 c", False)],
)
def test_figures_are_compared_closely(got: str, want: str, close: bool) -> None:
    assert same(got, want) is close


def test_every_install_line_is_tried() -> None:
    """``make test-install`` knows each form of the line that README, docs and notebooks give.

    But for vLLM's, which brings gigabytes for CUDA: ``make test-vllm`` runs what it installs on a CPU.
    """
    told = set()
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")):
        if path.name not in ("log.md", "report.md"):
            told |= set(re.findall(r"pip install 'thrift-attn\[([\w,]+)\]'", path.read_text(encoding="utf-8")))
    assert {"hf,kernels", "eval"} <= told
    assert told - {"vllm,eval"} <= {case.extras for case in CASES}
