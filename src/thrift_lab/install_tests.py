"""``make test-install``: a fresh environment for every documented install line, and in it what the docs say it runs.

The dated record knows the digest of what is installed and run: a test fails when that has changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

from thrift_lab.handbook.code_blocks import HUB_ID, blocks, same
from thrift_lab.handbook.measured import ROOT
from thrift_lab.records import make_context
from thrift_lab.run_tests import InstallRecord, Step


@dataclass(frozen=True)
class Case:
    """What an installation has to run.

    Args:
        extras: of the distribution.
        pages: whose blocks of Python run.
        commands: of ``thrift``.
        notebooks: whose cells run.
        imports: modules that are there.
    """

    extras: str
    pages: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    notebooks: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its step."""
        return f"[{self.extras}]"


CASES = (
    Case("", pages=("docs/budget.md",)),
    Case("hf,kernels", pages=("README.md", "docs/index.md", "docs/elsewhere.md", "docs/transformers.md")),
    Case("eval", commands=("--version", "doctor", "generate --help", "eval methods")),
    Case("eval,plot", commands=("doctor",), notebooks=("a_million_tokens",)),
    Case("eval,harness", commands=("eval harness --help",), imports=("lm_eval", "thrift_lab.eval.harness")),
)
"""Every form of the install line in README and docs, and what stands below it."""

_NOTEBOOK = """
import json, sys
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]))
"""


def digest_of_lines() -> str:
    """Return the SHA-256 of what decides whether an installation serves: requirements, and the code below the lines."""
    built, _, _ = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.ruff")
    total = hashlib.sha256(built.encode())
    for case in CASES:
        total.update(repr(case).encode())
        for page in case.pages:
            total.update("".join(block.code + (block.output or "") for block in blocks(ROOT / page)).encode())
        for notebook in case.notebooks:
            total.update((ROOT / "notebooks" / f"{notebook}.ipynb").read_bytes())
    return total.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Install and run every case and write the record; 0 if all of them do what they should."""
    parser = argparse.ArgumentParser(prog="python -m thrift_lab.install_tests", description=__doc__)
    parser.add_argument("model", help="a local folder that stands in for the model of the hub")
    known = [case.extras for case in CASES]
    parser.add_argument("--only", choices=known, help="the extras of one case; the others stay as the record has them")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "benchmarks/results/install-tests.json")
    options = parser.parse_args(arguments)
    record = InstallRecord(context=make_context(("torch", "transformers")), sources=digest_of_lines())
    cases = [case for case in CASES if options.only is None or options.only == case.extras]
    if options.only is not None:
        record.keep(options.out, [case.name for case in cases])
    with tempfile.TemporaryDirectory(prefix="thrift-install-") as folder:
        for number, case in enumerate(cases):
            print(case.name, flush=True)
            began = time.monotonic()
            try:
                ran, problems = _try(case, Path(folder) / str(number), options.model)
            except subprocess.CalledProcessError as error:
                ran, problems = 1, [f"{' '.join(error.cmd[1:])}: {error.stderr[-1500:]}"]
            step = Step(name=case.name, passed=ran - len(problems), failed=len(problems), problems=problems)
            step.seconds = round(time.monotonic() - began, 1)
            record.steps.append(step)
            record.save(options.out)
    problems = [f"{step.name} {problem}" for step in record.steps for problem in step.problems]
    print("\n".join(problems) or "green")
    return int(bool(problems))


def _try(case: Case, folder: Path, model: str) -> tuple[int, list[str]]:
    """Make the environment of a case and run all that it has to; how much that was, and what went wrong."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    wanted = f"{ROOT}[{case.extras}]" if case.extras else str(ROOT)
    _run([str(python), "-m", "pip", "install", "--quiet", os.environ.get("TORCH", "torch")], folder)
    _run([str(python), "-m", "pip", "install", "--quiet", wanted], folder)
    problems = []
    for page in case.pages:
        names = [block for block in blocks(ROOT / page) if not block.code.startswith(">>>")]
        lines, shown = [], []
        for block in names:
            lines.append(block.code.replace(HUB_ID, model))
            lines.append(f'print("<end of {block.line}>")\n')
            shown.append(f"{block.output or ''}<end of {block.line}>")
        found = _run([str(python), "-c", "\n".join(lines)], folder, check=False)
        silent = [block for block in names if block.output is None]
        right = not found.returncode and bool(silent or same(found.stdout, "\n".join(shown)))
        if not right:
            problems.append(f"{page}: {found.stdout[-500:]}{found.stderr[-1500:]}")
        print(f"  {page}: {len(names)} blocks, {'right' if right else 'WRONG'}", flush=True)
    notebooks = ROOT / "notebooks"
    runs = [
        (f"thrift {command}", [str(folder / "bin" / "thrift"), *command.split()], folder) for command in case.commands
    ]
    runs += [
        (name, [str(python), "-c", _NOTEBOOK, str(notebooks / f"{name}.ipynb")], notebooks)  # where it is opened
        for name in case.notebooks
    ]
    runs += [(f"import {module}", [str(python), "-c", f"import {module}"], folder) for module in case.imports]
    for name, command, where in runs:
        found = _run(command, where, check=False)
        if found.returncode:
            problems.append(f"{name}: {found.stdout[-800:]}{found.stderr[-1500:]}")
        print(f"  {name}: exit code {found.returncode}", flush=True)
    return len(case.pages) + len(runs), problems


def _run(command: list[str], folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command away from the checkout, so that what is imported is what was installed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"MPLBACKEND": "agg"}
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=check)


if __name__ == "__main__":
    sys.exit(main())
