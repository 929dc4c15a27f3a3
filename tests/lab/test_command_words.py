"""All commands of ``thrift`` call one thing by one name, and old names still work."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.main import get_command

from thrift_lab import cli, console
from thrift_lab.bench import bench_cli
from thrift_lab.eval import eval_cli

BESIDE = {"--html", "--markdown", "--plot"}
"""Files that a command writes beside its result, by what is in them."""

READ = {"--compare", "--data", "--file", "--only-telling", "--reasons"}
"""Files and folders that are read."""

PAGE = {"--models"}
"""A page of this repository that `thrift doctor` renews."""


def commands(app: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each command with its name and the context of its group."""
    group = get_command(app)
    context = group.make_context("thrift", [], resilient_parsing=True)

    def below(name: str, group: Any, context: Any) -> Iterator[tuple[str, Any, Any]]:
        for word, command in group.commands.items():
            if hasattr(command, "commands"):
                inside = command.make_context(word, [], parent=context, resilient_parsing=True)
                yield from below(f"{name} {word}", command, inside)
            else:
                yield f"{name} {word}", command, context

    return below("thrift", group, context)


ALL = {name: (command, context) for name, command, context in commands(cli.app)}


def options(name: str) -> dict[str, Any]:
    """The options of a command by each of their long names."""
    found = [param for param in ALL[name][0].params if param.opts[0].startswith("-")]
    return {word: param for param in found for word in param.opts if word.startswith("--")}


def kinds(name: str) -> dict[str, Any]:
    """The types that a command's function gives its options, by their long names."""
    hints = get_type_hints(inspect.unwrap(ALL[name][0].callback))
    return {word: hints[param.name] for word, param in options(name).items() if param.name in hints}


def test_the_commands_are_all_there() -> None:
    assert {"thrift demo", "thrift reproduce", "thrift eval nll", "thrift eval serve", "thrift bench fuzz"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_an_option_has_one_name_and_no_old_one(name: str) -> None:
    words = options(name)
    assert len({id(param) for param in words.values()}) == len(words)
    assert not {word.removeprefix("--") for word in words} & set(console.OLD_NAMES)


@pytest.mark.parametrize("name", ALL)
def test_what_a_command_makes_goes_to_out(name: str) -> None:
    paths = {word for word, kind in kinds(name).items() if kind in (Path, Path | None)}
    assert paths <= {"--out"} | BESIDE | READ | PAGE
    if "--out" in (words := options(name)):
        assert "--out" in paths
        assert words["--out"].opts == ["--out", "-o"]


@pytest.mark.parametrize("name", ALL)
def test_a_budget_is_called_so_and_read_from_text(name: str) -> None:
    for word, kind in kinds(name).items():
        if "budget" in word:
            assert word == "--budget"
            assert kind in (str, str | None, list[str], list[str] | None)
        assert "promoted" not in word or word == "--promoted-storage"


@pytest.mark.parametrize("app", [cli.app, eval_cli.app, bench_cli.app], ids=["thrift", "eval", "bench"])
def test_old_names_are_taken_and_not_shown(app: Any) -> None:
    tried = set()
    for name, command, context in commands(app):
        for old, new in console.OLD_NAMES.items():
            param = next((one for one in command.params if f"--{new}" in one.opts), None)
            if param is None:
                continue
            value = "nested8" if new == "promoted-storage" else "x"
            called = command.make_context(name, [f"--{old}", value], parent=context, resilient_parsing=True)
            said = called.params[param.name]
            assert str(said[0] if isinstance(said, (list, tuple)) else said) == value, (name, old)
            tried.add(old)
    assert tried >= {"json", "output", "budgets", "high"}


def test_old_names_of_bench_are_taken() -> None:
    for app, name in ((cli.app, "thrift bench decode"), (bench_cli.app, "thrift decode")):
        command, context = next((one, above) for known, one, above in commands(app) if known == name)
        for given, drawn in (([], True), (["--no-plot"], False), (["--no-pictures"], False), (["--plot"], True)):
            called = command.make_context(name, given, parent=context, resilient_parsing=True)
            assert called.params["pictures"] is drawn, (name, given)


def test_a_name_is_a_switch_or_takes_a_value_and_not_both() -> None:
    switches = {word for name in ALL for word, kind in kinds(name).items() if kind in (bool, bool | None)}
    valued = {word for name in ALL for word, kind in kinds(name).items() if kind not in (bool, bool | None)}
    assert switches & valued == {"--markdown"}  # prints, or writes a file beside the result


@pytest.mark.parametrize("app", [cli.app, eval_cli.app, bench_cli.app], ids=["thrift", "eval", "bench"])
def test_help_lists_every_command_in_one_line(app: Any) -> None:
    """Of a terminal of 120 columns; the order is named in full, so that a new command is given its place."""
    group = get_command(app)
    context = group.make_context("thrift", [], resilient_parsing=True)
    shown = [name for name in group.list_commands(context) if not group.commands[name].hidden]
    assert shown == [name for name in group.order if name in shown]
    for name in shown:
        first, _, _ = (group.commands[name].help or "").partition("\n\n")
        assert 20 < len(first) <= 105, (name, first)
        assert "\n" not in first.strip()
