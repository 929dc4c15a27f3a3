"""``make test-matrix``: tests that need no GPU with the oldest and the newest versions that are served, as one dated record.

The record knows the digest of the folders that its tests are named after: a test fails when they have changed since. What they
import from beside them (numerics, checks, dispatch) is not in it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from thrift_lab.provenance import digest_of_sources
from thrift_lab.records import make_context
from thrift_lab.run_tests import RunOptions, VersionsRecord

ROOMS = ("reference", "cache", "transformers")
"""Folders of ``thrift_attn`` whose sources a record speaks for: what depends on versions of Python, torch and transformers."""

FOLDERS = tuple(f"tests/{room}" for room in ROOMS)
"""Their tests."""

PACKAGES = ("torch", "transformers", "triton", "numpy", "safetensors")
"""Whose versions a row tells."""


class MatrixRecord(VersionsRecord):
    """What was found with each set of versions."""

    kind: str = "test-matrix"


def main(arguments: list[str] | None = None) -> int:
    """Run the tests with each Python and write the record; 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m thrift_lab.matrix_tests", description=__doc__)
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="Pythons with the packages of the tests")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/test-matrix.json"))
    parser.add_argument("--tests", nargs="+", default=FOLDERS, help="folders, or other arguments of pytest")
    parser.add_argument("--seconds", type=float, default=3600, help="that the tests of one folder may take")
    parser.add_argument("--workers", type=int, default=0, help="processes of pytest")
    options = parser.parse_args(arguments)
    import thrift_attn

    sources = digest_of_sources(Path(thrift_attn.__file__).parent, ROOMS)
    record = MatrixRecord(context=make_context(("torch", "transformers")), sources=sources)
    quiet = ["-q", "-n", str(options.workers), "-m", "not gpu and not slow", "-W", "ignore"]
    run = RunOptions(out=options.out, arguments=quiet, seconds=options.seconds)
    return int(not record.run(options.pythons, PACKAGES, options.tests, run))


if __name__ == "__main__":
    sys.exit(main())
