"""``make test-gpu``: what only a GPU can tell, as one dated record.

Kernel tests compiled, laws on random shapes against float64, compute-sanitizer's memcheck over a few of them and its racecheck
over the FP8 kernel of sm_90. The record knows the digest of the kernels' sources: a test fails when they have changed since.
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from thrift_lab.provenance import digest_of_sources
from thrift_lab.records import make_context
from thrift_lab.run_tests import Step, StepsRecord, run_pytest

ROOMS = ("kernels", "prefill", "decode")
"""Folders of ``thrift_attn`` whose sources a record speaks for."""


LAWS = ("test_a_budget_of_one_is_exact", "test_packed_sequences_equal_each_alone", "test_paged_equals_contiguous")
"""Laws that memcheck looks at."""


class GPUTestRecord(StepsRecord):
    """What a run on a GPU found; ``sources`` is `digest_of_kernels`."""

    kind: str = "gpu-tests"


def digest_of_kernels(package: Path) -> str:
    """Return the SHA-256 of the sources of the kernels and their launchers, without imports, docstrings, comments and layout.

    Args:
        package: the folder of ``thrift_attn``.
    """
    return digest_of_sources(package, ROOMS)


@dataclass(frozen=True)
class Mailbox:
    """Where compute-sanitizer sees the compiler's own code of warp specialisation in the file of the FP8 kernel.

    racecheck reports pairs of accesses to the mailbox through which warps get their work: one at the kernel's definition and
    one at its ``gl.warp_specialize``, or both at one of the two. They are ordered by a barrier of all warps, which the tool
    does not see (docs/log.md). Any other pair is a new report.

    Args:
        file: name of the kernel's file.
        lines: of the definition and of the call.
    """

    file: str
    lines: frozenset[int]

    @classmethod
    def of(cls, source: Path) -> Mailbox:
        """Find both lines in the kernel's source."""
        text = source.read_text().splitlines()
        marks = ("def attend_fp8_kernel(", "    gl.warp_specialize(")
        return cls(source.name, frozenset(at for at, line in enumerate(text, 1) if line.startswith(marks)))

    def new_reports(self, output: str) -> list[str]:
        """Return the reports of racecheck that are not about the mailbox; that it never ran is one."""
        found = [] if "RACECHECK SUMMARY" in output else ["racecheck wrote no summary: it did not run to its end"]
        for report in re.split(r"(?=^=+ (?:Error|Warning|Info): )", output, flags=re.MULTILINE)[1:]:
            places = [(Path(file).name, int(line)) for file, line in re.findall(r"([\w./-]+\.py):(\d+)", report)]
            known = len(places) >= 2 and all(file == self.file and line in self.lines for file, line in places)
            if "hazard" in report.lower() and not known:
                found.append(" ".join(report.split())[:300])
        return found


def _run(name: str, tests: list[str], prefix: list[str] | None, seconds: float, *, package: Path) -> Step:
    """Run one step, and look for what compute-sanitizer has to say."""
    step, output = run_pytest(name, tests, prefix, seconds)
    if prefix and "memcheck" in prefix:
        summaries = re.findall(r"ERROR SUMMARY: (\d+) error", output)
        step.problems += [f"memcheck found {n} errors" for n in summaries if int(n)]
        step.problems += [] if summaries else ["memcheck wrote no summary: it did not run to its end"]
    if prefix and "racecheck" in prefix:
        step.problems += Mailbox.of(package / "prefill/sm90_fp8/kernel.py").new_reports(output)
    if step.failed:
        print("\n".join(line for line in output.splitlines() if line.startswith(("E  ", "FAILED")))[-4000:], flush=True)
    return step


def join(records: list[GPUTestRecord], only: list[str] | None = None) -> GPUTestRecord:
    """Return one record with the steps of several, which ran apart; of a step that several have, the last.

    Args:
        records: of the same sources and commit.
        only: beginnings of the names of steps that are taken; all by default.

    Raises:
        ValueError: records of other sources or commits.
    """
    first = records[0]
    for other in records[1:]:
        if (other.sources, other.context["commit"]) != (first.sources, first.context["commit"]):
            raise ValueError(
                f"expected records of sources {first.sources[:8]} at {first.context['commit']}, got {other.sources[:8]} at "
                f"{other.context['commit']}"
            )
    steps = {step.name: step for record in records for step in record.steps}
    taken = [step for step in steps.values() if not only or step.name.startswith(tuple(only))]
    context = {**first.context, "joined": [record.context["created"] for record in records]}
    return GPUTestRecord(context=context, sources=first.sources, steps=taken)


def main(arguments: list[str] | None = None) -> int:
    """Run all steps and write the record; 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m thrift_lab.gpu_tests", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/gpu-tests.json"))
    parser.add_argument("--workers", type=int, default=8, help="processes of pytest that share the GPU")
    parser.add_argument(
        "--join",
        nargs="+",
        type=Path,
        help="run nothing: join the steps of records of these sources; later files count",
    )
    parser.add_argument("--at-once", action="store_true", help="all steps side by side, where there are cores enough")
    parser.add_argument(
        "--only",
        action="append",
        help="run the steps whose names begin so; the others stay as a record of the same sources has them",
    )
    options = parser.parse_args(arguments)
    if options.join:
        joined = join([GPUTestRecord.load(path) for path in options.join], options.only)
        joined.save(options.out)
        print(f"{', '.join(step.name for step in joined.steps)}; wrote {options.out}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("make test-gpu needs a CUDA device", file=sys.stderr)
        return 2
    import thrift_attn

    package = Path(thrift_attn.__file__).parent
    record = GPUTestRecord(
        context=make_context(
            ("torch", "triton", "transformers"), gpu=torch.cuda.get_device_name(), gpus=torch.cuda.device_count()
        ),
        sources=digest_of_kernels(package),
    )
    workers = ["-n", str(options.workers), "-q"]
    steps: list[tuple[str, list[str], list[str] | None, float]] = [
        ("kernel tests", ["tests/prefill", "tests/decode", *workers], None, 300),
        ("laws on random shapes", ["tests/laws", *workers], None, 300),
        ("graphs of models", ["tests/transformers/test_generate.py", "-q"], None, 200),
    ]
    if torch.cuda.device_count() > 1:
        places = ["tests/decode/test_hazards.py", "tests/transformers/test_two_gpus.py"]
        more = [*places, "-q", "-n", "0", "-k", "not_the_current or two_gpus"]
        steps.append(("two GPUs", more, None, 200))
    few = ["-q", "-n", "0", *(f"tests/laws/test_laws.py::{name}[{n}]" for name in LAWS for n in range(2))]
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    steps.append(("memcheck over a few laws", few, memcheck, 200))
    # Only the kernel itself is watched, on one small shape with promotion: watching PyTorch's kernels too takes over 5 minutes.
    race = ["tests/prefill/test_sm90_fp8.py", "-q", "-n", "0", "-k", "test_chunked and 100-1000"]
    racecheck = ["compute-sanitizer", "--tool", "racecheck", "--kernel-name", "kns=attend_fp8_kernel"]
    steps.append(("racecheck of the FP8 kernel of sm_90", race, racecheck, 300))
    steps = [step for step in steps if not options.only or step[0].startswith(tuple(options.only))]
    if options.only:
        record.keep(options.out, [name for name, *_ in steps])
    with ThreadPoolExecutor(len(steps) if options.at_once else 1) as pool:
        waiting = {pool.submit(_run, *step, package=package): step for step in steps}
        for done in as_completed(waiting):
            step = done.result()
            record.steps.append(step)
            record.save(options.out)
            step.tell()
    bad = not all(step.is_green for step in record.steps)
    print(f"{'FAILED' if bad else 'green'}; wrote {options.out}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
