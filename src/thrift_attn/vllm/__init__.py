"""Pages of thrift in vLLM: an attention backend outside of its tree (docs/vllm.md).

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"thrift": {"budget": "5%"}}'

`register` is the entry point in vLLM's group ``vllm.general_plugins``. It runs in every vLLM process of an environment where
thrift-attn is installed, also for models that want nothing of it, so it only tells vLLM where the backend is: the modules
beside this one are imported when a model has chosen it.
"""

from __future__ import annotations

import logging
import os

BACKEND = "thrift_attn.vllm.chosen.ThriftBackend"
"""Where vLLM finds the backend."""

CPU_BACKEND = "thrift_attn.vllm.chosen.ThriftCPUBackend"
"""The same under the only name that vLLM takes on a CPU."""

ON_CPU = "THRIFT_VLLM_CPU"
"""Environment variable: with ``1`` thrift takes the place of vLLM's attention on a CPU, where vLLM lets nobody choose."""

_log = logging.getLogger("vllm.thrift_attn")


def register() -> None:
    """Tell vLLM where the backend is; never raises, and may be called any number of times.

    Another plugin that is ``CUSTOM`` already stays so.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        custom = AttentionBackendEnum.CUSTOM
        if custom.is_overridden() and custom.get_path() != BACKEND:
            _log.warning("thrift: --attention-backend CUSTOM is %s here, and stays so", custom.get_path())
        else:
            register_backend(custom, BACKEND)
        if os.environ.get(ON_CPU) == "1":
            register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
    except Exception as error:  # whatever it is, it must not stop a model that wants nothing of thrift
        _log.warning("thrift: this vLLM was not told of the thrift backend: %s: %s", type(error).__name__, error)
