"""Which versions of vLLM are served, and what differs between them. vLLM's attention interface changes with every release."""

from __future__ import annotations

import re
from typing import Any

FIRST, LAST = (0, 29), (0, 32)
"""The first and the last minor version that `make test-vllm` runs; those between them were read."""


def check_version(version: str) -> None:
    """Refuse a vLLM that thrift was not tested with, before anything of it is used.

    Args:
        version: such as ``"0.32.0+cpu"``.

    Raises:
        NotImplementedError: a version outside of the tested range.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or not FIRST <= (int(found[1]), int(found[2])) <= LAST:
        first, last = (".".join(map(str, one)) for one in (FIRST, LAST))
        raise NotImplementedError(
            f"the thrift backend serves vLLM {first} to {last}, this is {version}; without --attention-backend CUSTOM this "
            "vLLM runs as if thrift were not installed"
        )


def host_lengths(common: Any) -> list[int]:
    """Lengths of the sequences of a batch, exact for those that bring a part of their prompt, without waiting for the device.

    Args:
        common: vLLM's ``CommonAttentionMetadata``.
    """
    bound = common.seq_lens_cpu_upper_bound
    return (common.seq_lens if bound is None else bound).tolist()


def without_adapters(runner: Any, tokens: int) -> None:
    """Let the next run of a model be that of its base, where it serves LoRA adapters: layers look up which token has which.

    Args:
        runner: vLLM's model runner.
        tokens: of that run, all of one sequence.
    """
    if hasattr(runner, "lora_manager"):
        runner._set_active_loras((0,), (0,) * tokens, set())
