"""The public names and signatures are what public_names.txt says: a change of it is a change for users.

After a wanted change: ``python tests/architecture/test_public_names.py`` writes the file anew; say it in CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

RECORD = Path(__file__).with_name("public_names.txt")
MODULES = ("thrift_attn", "thrift_attn.cache", "thrift_attn.transformers")


def _parameters(thing: object) -> str:
    """Names, kinds and defaults of a call, without annotations, which Python versions print differently."""
    signature = inspect.signature(thing)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _members(kind: type) -> list[str]:
    lines = []
    for name in sorted(dir(kind)):
        member = inspect.getattr_static(kind, name)
        if name.startswith("_") or not getattr(getattr(kind, name), "__module__", "thrift_attn").startswith(
            "thrift_attn"
        ):
            continue
        if isinstance(member, (staticmethod, classmethod)) or inspect.isfunction(member):
            lines.append(f"    .{name}{_parameters(getattr(kind, name))}")
        elif isinstance(member, property):
            lines.append(f"    .{name}")
    return lines


def public_names() -> str:
    lines = []
    for name in MODULES:
        module = importlib.import_module(name)
        lines.append(name)
        for public in sorted(module.__all__):
            thing = getattr(module, public)
            if inspect.isclass(thing):
                lines += [f"  {public}{_parameters(thing)}", *_members(thing)]
            elif callable(thing):
                lines.append(f"  {public}{_parameters(thing)}")
            else:
                lines.append(f"  {public} = {thing!r}")
    return "\n".join(lines) + "\n"


def test_public_names_are_as_recorded():
    assert public_names() == RECORD.read_text()


if __name__ == "__main__":
    RECORD.write_text(public_names())
