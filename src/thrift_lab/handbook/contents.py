"""Which files of the documentation are written, and what is in them."""

from __future__ import annotations

from pathlib import Path

from thrift_lab.handbook.drawing import THEMES
from thrift_lab.handbook.measured import ROOT
from thrift_lab.handbook.method_picture import method_picture
from thrift_lab.handbook.quality_picture import quality_picture
from thrift_lab.handbook.speed_picture import speed_picture
from thrift_lab.handbook.tables import renewed

PICTURES = {"method": method_picture, "quality": quality_picture, "speed": speed_picture}


def contents() -> dict[Path, str]:
    """Every picture in both themes, and every page with tables, by path."""
    made = {
        ROOT / "docs" / "images" / f"{name}-{theme}.svg": draw(theme)
        for name, draw in PICTURES.items()
        for theme in THEMES
    }
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if "<!-- table " in text:
            made[page] = renewed(text)
    return made
