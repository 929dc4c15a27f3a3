"""``make test-matrix``: tests that need no GPU with the oldest and the newest versions that are served, as one dated record."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, Field

from thrift_lab.gpu_tests import Step, run_pytest
from thrift_lab.records import Record, make_context

FOLDERS = ("tests/reference", "tests/cache", "tests/transformers")
"""What depends on the versions of Python, torch and transformers."""

ASK = """
import importlib.metadata as m, json, platform, sys
names = sys.argv[1:]
found = {d.metadata["Name"]: d.version for d in m.distributions()}
print(json.dumps({"python": platform.python_version(), **{n: found.get(n) for n in names}}))
"""


PACKAGES = ("torch", "transformers", "triton", "numpy", "safetensors")
"""Whose versions a row tells."""


class Versions(BaseModel):
    """The tests with one set of versions.

    Args:
        versions: of Python and of packages.
        steps: what was run.
    """

    versions: dict[str, str | None]
    steps: list[Step] = Field(default_factory=list)

    @classmethod
    def of(cls, python: str, packages: tuple[str, ...] = PACKAGES) -> Versions:
        """Return an empty row of a Python, and tell what it has."""
        told = subprocess.run([python, "-c", ASK, *packages], capture_output=True, text=True, check=True).stdout
        row = cls(versions=json.loads(told))
        print(", ".join(f"{name} {version}" for name, version in row.versions.items()), flush=True)
        return row


class MatrixRecord(Record):
    """What was found with each set of versions."""

    KINDS: ClassVar[tuple[str, ...]] = ("test-matrix",)

    kind: str = "test-matrix"
    rows: list[Versions] = Field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """Run the tests with each Python and write the record; 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m thrift_lab.matrix_tests", description=__doc__)
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="Pythons with the packages of the tests")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/test-matrix.json"))
    parser.add_argument("--tests", nargs="+", default=FOLDERS, help="folders, or other arguments of pytest")
    parser.add_argument("--seconds", type=float, default=3600, help="that the tests of one folder may take")
    options = parser.parse_args(arguments)
    record = MatrixRecord(context=make_context(("torch", "transformers")))
    for python in options.pythons:
        row = Versions.of(python)
        record.rows.append(row)
        for folder in options.tests:
            quiet = ["-q", "-n", "0", "-m", "not gpu and not slow", "-W", "ignore"]
            step, _ = run_pytest(folder, [folder, *quiet], seconds=options.seconds, python=python)
            row.steps.append(step)
            record.save(options.out)
            step.tell("  ")
    bad = not all(step.is_green for row in record.rows for step in row.steps)
    print(f"{'FAILED' if bad else 'green'}; wrote {options.out}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
