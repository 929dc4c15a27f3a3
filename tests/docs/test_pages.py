"""The documentation is current and whole: pictures, tables, links, and an example for every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.test_code_blocks import PAGES, ROOT
from thrift_lab.handbook.contents import contents
from thrift_lab.handbook.drawing import Picture
from thrift_lab.handbook.tables import TABLES, renewed

CONTENTS = contents()


@pytest.mark.parametrize("path", CONTENTS, ids=lambda path: path.name)
def test_pictures_and_tables_are_current(path: Path) -> None:
    """After a new record: ``make figures``."""
    assert path.read_text(encoding="utf-8") == CONTENTS[path]


def test_every_table_stands_in_a_page() -> None:
    pages = "".join(text for path, text in CONTENTS.items() if path.suffix == ".md")
    assert all(f"<!-- table {name} -->" in pages for name in TABLES)
    with pytest.raises(KeyError):
        renewed("<!-- table unknown -->\n<!-- end -->")


def test_a_stale_table_is_renewed() -> None:
    stale = "before\n<!-- table storage -->\n| old |\n<!-- end -->\nafter"
    fresh = renewed(stale)
    assert "old" not in fresh
    assert fresh.startswith("before\n")
    assert fresh.endswith("\nafter")
    assert renewed(fresh) == fresh


def test_pictures_escape_what_they_write() -> None:
    picture = Picture(10, 10, "light", 'a "b" & c')
    picture.words((0, 0), "x < y")
    assert "x &lt; y" in picture.svg()
    assert "'a \"b\" &amp; c'" in picture.svg()


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
LINKED = sorted(path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))


def slug(heading: str) -> str:
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    dead = []
    for found in LINK.finditer(text):
        link = found[1] or found[2]
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() and not (target.parent == ROOT / "docs" and target.name == "cli.md"):
            dead.append(link)
        elif anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            if anchor not in map(slug, headings):
                dead.append(link)
    assert dead == []


OF_TRANSFORMERS = {
    "get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state", "get_mask_sizes", "update",
    "is_compileable", "is_croppable", "is_dummy", "is_initialized", "is_linear", "is_sliding",
}  # fmt: skip
"""What transformers calls on a cache, not its user."""

INSIDE = {"paged_layers", "prefill_on", "decode"}
"""Of a cache: what `thrift_lab` and the layers read."""


def test_every_public_name_has_an_example() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    code = "\n".join(block.code for block in PAGES["docs/api.md"]) + re.sub(r"^::: .*$", "", page, flags=re.MULTILINE)
    module, owner, lacking = "", "", []
    for line in (ROOT / "tests" / "architecture" / "public_names.txt").read_text().splitlines():
        name = re.match(r"\s*\.?(\w+(?:\.\w+)*)", line)
        assert name is not None
        if not line.startswith(" "):
            module = name[1]
        elif not line.startswith("    "):
            owner = name[1]
            if f"::: {module}.{owner}\n" not in page or not re.search(rf"\b{owner}\b", code):
                lacking.append(f"{module}.{owner}")
        elif name[1] in {"balance", "high", "low", "math", "sink", "total"} and owner == "ThriftConfig":
            continue  # old names, until 0.3
        elif name[1] not in OF_TRANSFORMERS | INSIDE and f".{name[1]}" not in code:
            lacking.append(f"{owner}.{name[1]}")
    assert lacking == []
