"""Hooks of mkdocs: pages and files from outside of docs/, links to them, and the reference of commands."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parents[3]
PAGES = ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""Pages of the repository's root that the site has, too."""

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, the reference of commands, and every file that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "cli.md", content=_commands()))
    linked = set()
    for source in [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in PAGES)]:
        for found in _LINK.finditer(source.read_text(encoding="utf-8")):
            target = Path(os.path.normpath(source.parent / found[2]))
            if target.is_file() and target.is_relative_to(ROOT) and not target.is_relative_to(ROOT / "docs"):
                linked.add(target)
    for target in sorted(linked):
        where = target.relative_to(ROOT).as_posix()
        if where not in PAGES:
            files.append(File.generated(config, where, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links out of docs/ and into it lead to where the site has these files; links to folders become words."""
    outside = page.file.src_uri in PAGES
    home = ROOT if outside else ROOT / "docs"

    def moved(found: re.Match[str]) -> str:
        link, anchor = found[2], found[3] or ""
        if re.match(r"\w+:", link):
            return found[0]
        target = Path(os.path.normpath(home / link))
        if target.is_relative_to(ROOT / "docs"):
            return f"{found[1]}{target.relative_to(ROOT / 'docs').as_posix()}{anchor})"
        if target.is_relative_to(ROOT):
            return f"{found[1]}{target.relative_to(ROOT).as_posix()}{anchor})"
        return found[0]

    without_folders = re.sub(
        r"\[([^\]]*)\]\(([^)\s#:]+)\)", lambda m: m[1] if (home / m[2]).resolve().is_dir() else m[0], markdown
    )
    return _LINK.sub(moved, without_folders)


def _commands() -> str:
    """The reference of ``thrift``, from the program itself."""
    import typer
    from typer.main import get_command

    from thrift_lab.cli import app

    lines = ["# Commands", "", "From `thrift --help`, of the program itself.", ""]
    command = get_command(app)
    _command(lines, "thrift", command, typer.Context(command, info_name="thrift"), 2)  # pyright: ignore[reportArgumentType]
    return "\n".join(lines) + "\n"


def _command(lines: list[str], name: str, command: Any, context: Any, level: int) -> None:
    """Append a command, its arguments and options, and what is below it."""
    lines += [f"{'#' * level} {name}", "", _plain(command.help), ""]
    groups = getattr(command, "commands", None)
    if groups:
        for below in (name for name in command.list_commands(context) if not groups[name].hidden):
            _command(lines, f"{name} {below}", groups[below], context, level + 1)
        return
    rows = []
    for param in command.params:
        if param.name == "help" or getattr(param, "hidden", False):
            continue
        names = (
            ", ".join(f"`{one}`" for one in (*param.opts, *param.secondary_opts))
            if param.opts[0].startswith("-")
            else ""
        )
        names = names or f"`{param.name.upper()}`"
        default = param.default() if callable(param.default) else param.default
        shown = "" if param.required or default in (None, False, "", [], ()) else f"`{_value(default)}`"
        rows.append(f"| {names} | {_plain(getattr(param, 'help', '')).replace('|', chr(92) + '|')} | {shown} |")
    if rows:
        lines += ["| option | what it does | default |", "|---|---|---|", *rows, ""]


def _value(default: Any) -> str:
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default))
    return str(getattr(default, "value", default)).replace("|", "\\|")


def _plain(text: str | None) -> str:
    """Help without markup of rich, in one paragraph; methods and names in angle brackets stay readable."""
    return re.sub(r"\[/?[a-z]+\]", "", " ".join((text or "").split())).replace("<", "&lt;")
