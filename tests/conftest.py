"""Kernel tests (prefill/, decode/) run compiled where there is a GPU, else interpreted on the CPU.

The interpreter has to be chosen before Triton is first imported, and it would reach into every other test of the process, so
``make test`` runs those folders by themselves with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from thrift_attn.dispatch import interpreted

KERNEL_FOLDERS = {"prefill", "decode"}

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


@pytest.fixture(autouse=True, scope="session")
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models and caches: on a busy machine threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
