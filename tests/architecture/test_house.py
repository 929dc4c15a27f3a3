"""Rules of the house: sizes, names, widths of calls, imports one way, and a library that does not need the laboratory."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 450
STILL_LONG: set[str] = set()
"""Modules that are yet to be split; the list may only become shorter."""

MAX_PARAMETERS = 12
PUBLIC = {"attention", "attention_varlen"}
FLAT = ("jit", "custom_op", "register_fake", "command")
"""Decorators of kernels, operator schemas and commands, which have as many parameters as they need."""

OUTSIDE = {"torch", "triton", "transformers", "vllm", "safetensors", "typing_extensions"}
"""What the library half may import, beside itself and Python's own."""


def module(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_is_long():
    long = {module(path): n for path in FILES if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert {name: n for name, n in long.items() if name not in STILL_LONG} == {}


def test_no_two_modules_have_one_name():
    """prefill/X and decode/X may mirror each other."""
    homes = defaultdict(list)
    for path in FILES:
        if path.name not in ("__init__.py", "__main__.py"):
            homes[path.name].append(path.parent.name)
    twice = {name: folders for name, folders in homes.items() if len(folders) > 1}
    assert {name: where for name, where in twice.items() if sorted(where) != ["decode", "prefill"]} == {}


def test_no_call_is_wide():
    wide = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name in PUBLIC:
                continue
            if any(word in ast.dump(decorator) for decorator in node.decorator_list for word in FLAT):
                continue
            count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
            if count > MAX_PARAMETERS:
                wide.append((module(path), node.name, count))
    assert wide == []


def _imports() -> dict[str, set[str]]:
    names = {module(path) for path in FILES}
    found: dict[str, set[str]] = {}
    for path in FILES:
        own = found[module(path)] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                asked = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                asked = [alias.name for alias in node.names]
            else:
                continue
            own |= {name for name in asked if name in names and name != module(path)}
    return found


def test_no_import_goes_in_a_circle():
    """Also of imports inside functions, which import-linter does not follow everywhere."""
    imports, done, circles = _imports(), set(), []

    def visit(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            circles.append(way[way.index(name) :])
        elif name not in done:
            for other in sorted(imports[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(imports):
        visit(name, ())
    assert circles == []


PROBE = """
import importlib, importlib.abc, pkgutil, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "thrift_lab":
            raise ModuleNotFoundError(f"the library asked for {name}", name=name)

sys.meta_path.insert(0, Absent())
import thrift_attn
for found in pkgutil.walk_packages(thrift_attn.__path__, "thrift_attn."):
    if "sm90_fp8" not in found.name and ".vllm." not in found.name:  # Gluon, which not every Triton has; vLLM
        importlib.import_module(found.name)
print("all")
"""


def test_the_library_works_without_the_laboratory():
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.strip().endswith("all")


def test_the_library_imports_torch_triton_transformers_vllm_and_no_more():
    asked = set()
    for path in FILES:
        if not module(path).startswith("thrift_attn"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                asked |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                asked.add(node.module.split(".")[0])
    assert asked - set(sys.stdlib_module_names) - {"thrift_attn"} <= OUTSIDE
