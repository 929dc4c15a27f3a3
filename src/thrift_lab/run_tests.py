"""Runs of tests as records: a step for each part, a row for each set of versions, and the digest of what they speak for.

``make test-gpu``, ``test-matrix``, ``test-vllm`` and ``test-install`` write such records; tests hold them to today's sources.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from pydantic import BaseModel, Field

from thrift_lab.records import Record
from thrift_lab.sheet import Sheet

COLUMNS = ("step", "passed", "failed", "skipped", "seconds")
"""What tables tell of a step."""


class Step(BaseModel):
    """One part of a run.

    Args:
        name: what was run.
        passed: number of tests.
        failed: number of tests.
        skipped: number of tests.
        seconds: that it took.
        problems: what went wrong, a line each.
        mended: problems that were of a test and not of the sources it tests, and what has become of them. Entered by hand;
            the next run has to do without.
    """

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problems: list[str] = Field(default_factory=list)
    mended: dict[str, str] = Field(default_factory=dict)

    @property
    def is_green(self) -> bool:
        """Whether something ran and all of it passed."""
        return self.passed > 0 and not self.failed and not self.problems

    def cells(self) -> tuple[str, ...]:
        """Return it as a row under `COLUMNS`."""
        return self.name, *(f"{x:,}" for x in (self.passed, self.failed, self.skipped)), f"{self.seconds:,.0f}"

    def tell(self, indent: str = "") -> None:
        """Print what was found."""
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped, {self.seconds} s"
        print(f"{indent}{self.name}: {counts}", flush=True)
        for problem in self.problems:
            print(f"{indent}  {problem}", flush=True)


def problems_of(steps: Iterable[Step]) -> str:
    """Return what went wrong in some steps, a line each."""
    return "\n".join(f"{step.name}: {problem}" for step in steps for problem in step.problems)


class StepsRecord(Record):
    """What steps found, and for which sources.

    Args:
        sources: digest of what they speak for.
        steps: each once.
    """

    sources: str = ""
    steps: list[Step] = Field(default_factory=list)

    def table(self) -> Sheet:
        """See `Record.table`."""
        bad = {at: "red" for at, step in enumerate(self.steps) if not step.is_green}
        return Sheet(COLUMNS, [step.cells() for step in self.steps], self.kind, problems_of(self.steps), styles=bad)

    def keep(self, path: Path, again: Iterable[str]) -> None:
        """Take over the steps of an earlier record of the same sources.

        Args:
            path: of the record; nothing is taken where there is none.
            again: names of the steps that are run again.
        """
        if path.exists() and (earlier := type(self).load(path)).sources == self.sources:
            self.steps = [step for step in earlier.steps if step.name not in set(again)]


class InstallRecord(StepsRecord):
    """What was found in the environment of each install line: a step for each, in which what ran counts as passed.

    ``sources`` is `thrift_lab.install_tests.digest_of_lines`.
    """

    kind: str = "install-tests"


class Versions(BaseModel):
    """The steps of one Python.

    Args:
        versions: of Python and of packages.
        steps: what was run.
    """

    versions: dict[str, str | None]
    steps: list[Step] = Field(default_factory=list)


class VersionsRecord(Record):
    """What the same steps found with several sets of versions, and for which sources.

    Args:
        sources: digest of what they speak for.
        rows: by set of versions.
    """

    sources: str = ""
    rows: list[Versions] = Field(default_factory=list)

    def table(self) -> Sheet:
        """See `Record.table`."""
        steps = [(row, step) for row in self.rows for step in row.steps]
        told = [
            (", ".join(f"{name} {x}" for name, x in row.versions.items() if x), *step.cells()) for row, step in steps
        ]
        bad = {at: "red" for at, (_, step) in enumerate(steps) if not step.is_green}
        problems = problems_of([step for _, step in steps])
        return Sheet(("versions", *COLUMNS), told, self.kind, problems, left=2, styles=bad)

    def run(self, pythons: Sequence[str], packages: Sequence[str], tests: Sequence[str], options: RunOptions) -> bool:
        """Run tests with each Python, and save the record after each.

        Args:
            pythons: to run them with.
            packages: whose versions a row tells.
            tests: folders or files, a step each.
            options: of all of them.

        Returns:
            Whether all steps are green.
        """
        for python in pythons:
            row = Versions(versions=versions_of(python, packages))
            print(", ".join(f"{name} {version}" for name, version in row.versions.items()), flush=True)
            self.rows.append(row)
            for name in tests:
                arguments = [name, *options.arguments]
                step, output = run_pytest(name, arguments, seconds=options.seconds, python=python)
                row.steps.append(step)
                self.save(options.out)
                step.tell("  ")
                if not step.is_green:
                    print(output[-4000:], flush=True)
        green = all(step.is_green for row in self.rows for step in row.steps)
        print(f"{'green' if green else 'FAILED'}; wrote {options.out}")
        return green


class RunOptions(BaseModel):
    """How `VersionsRecord.run` runs its tests.

    Args:
        out: where the record is written.
        arguments: of pytest.
        seconds: that a step may take.
    """

    out: Path
    arguments: list[str]
    seconds: float


_ASK = """
import importlib.metadata as m, json, platform, sys
names = sys.argv[1:]
found = {d.metadata["Name"]: d.version for d in m.distributions()}
print(json.dumps({"python": platform.python_version(), **{n: found.get(n) for n in names}}))
"""


def versions_of(python: str, packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of a Python and of packages in it, None for those it does not have."""
    done = subprocess.run([python, "-c", _ASK, *packages], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def run_pytest(
    name: str,
    arguments: list[str],
    prefix: list[str] | None = None,
    seconds: float = 600,
    python: str = sys.executable,
) -> tuple[Step, str]:
    """Run pytest in a process of its own and return what it counted, and its output.

    Args:
        name: of the step.
        arguments: of pytest.
        prefix: a command that runs it, such as compute-sanitizer.
        seconds: after which it is stopped, which is a problem of the step.
        python: that has pytest.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        alone = ["-p", "no:cacheprovider", "-m", "", f"--junitxml={report}"]
        command = [*(prefix or []), python, "-m", "pytest", *alone, *arguments]
        step = Step(name=name)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
            output = done.stdout + done.stderr
        except FileNotFoundError as error:
            step.problems.append(f"{error.filename} is not installed")
            output = ""
        except subprocess.TimeoutExpired as error:
            step.problems.append(f"stopped after {seconds:.0f} s")
            output = str(error.stdout or "")
        if report.exists():
            for suite in ElementTree.parse(report).iter("testsuite"):
                total, bad, skipped = (int(suite.get(key, "0")) for key in ("tests", "failures", "skipped"))
                bad += int(suite.get("errors", "0"))
                step.failed, step.skipped, step.passed = bad, skipped, total - bad - skipped
        elif not step.problems:
            step.problems.append("pytest wrote no report: " + " ".join(output.split()[-30:]))
        step.problems += re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)[:20]
    step.seconds = round(time.monotonic() - began, 1)
    return step, output
