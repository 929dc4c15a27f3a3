"""What vLLM looks up when a model has chosen thrift: the backend, where this vLLM is one of those that are served."""

from __future__ import annotations

from typing import Any

import vllm

from thrift_attn.vllm.vllm_versions import check_version


def __getattr__(name: str) -> Any:
    """Check the version before anything is imported that another version may not have.

    Raises:
        NotImplementedError: a version that thrift was not tested with.
    """
    if name not in ("ThriftBackend", "ThriftCPUBackend"):
        raise AttributeError(name)
    check_version(vllm.__version__)
    from thrift_attn.vllm import attention_backend

    return getattr(attention_backend, name)
