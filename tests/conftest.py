"""Kernel tests (prefill/, decode/, laws/) run compiled where there is a GPU, else interpreted on the CPU.

The interpreter has to be chosen before Triton is first imported, and it would reach into every other test of the process, so
``make test`` runs those folders by themselves with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest
import torch

from thrift_attn.dispatch import interpreted

KERNEL_FOLDERS = {"prefill", "decode", "laws"}

if interpreted():
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, *scope) -> None:
        """Triton 3.6 converts arrays of one element to a loop bound in a way that numpy 2.4 refuses."""
        _patch(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_lang_tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and not interpreted():
        for item in items:
            if item.path.parent.name in KERNEL_FOLDERS:
                item.add_marker(pytest.mark.skip(reason="without a GPU kernel tests need TRITON_INTERPRET=1"))


MAY_SKIP = {
    "needs TRITON_INTERPRET=1": "kernel tests are a run of their own, see make test",
    "written in the Gluon of Triton 3.6": "make test runs that file again with Triton 3.6",
    "compiled": "what a GPU alone can tell",
    "GPU": "what a GPU alone can tell",
    "is no multiple of 32": "mxfp4 has no such head dim",
    "CUDA": "what a GPU alone can tell",
    "interpreter": "what the interpreter cannot do, and a compiled run does",
    "could not import 'lm_eval'": "an extra of its own, too large for CI",
}
"""Parts of the reasons for which a test may be skipped under CI=true, and why that hides nothing."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI=true a skipped test fails unless its reason is in `MAY_SKIP`."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(part in reason for part in MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = f"skipped under CI=true for a reason that tests/conftest.py does not list: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for whole files (`pytest.importorskip`)."""
    report = yield
    if report.outcome == "skipped" and os.environ.get("CI") == "true":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(part in reason for part in MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = f"skipped under CI=true for a reason that tests/conftest.py does not list: {reason}"
    return report


@pytest.fixture(autouse=True, scope="session")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models and caches: on a busy machine threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
