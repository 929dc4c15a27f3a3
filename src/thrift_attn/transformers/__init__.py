"""``attn_implementation="thrift"`` and a KV cache for decoder-only models of transformers 5.

    from thrift_attn.transformers import ThriftCache, disable, enable, report

    enable(model, ThriftConfig(budget=fraction(0.05)))
    model.generate(...)
    print(report(model))
    disable(model)

or, with the default configuration: ``register()`` and ``from_pretrained(..., attn_implementation="thrift")``. With
``cache=ThriftCache(model.config, max_tokens=...)`` (``past_key_values=`` before transformers 5.24) K and V are also stored in
4 bits, and that cache's configurations say what is computed.

Inference only. Not traceable by torch.compile: `enable` keeps ``generate`` from compiling the model for a static cache on
GPU; without `enable`, pass it ``disable_compile=True``.
"""

from thrift_attn.transformers import versions  # noqa: F401 (first: it says which transformers is needed)
from thrift_attn.transformers.layer_report import report
from thrift_attn.transformers.switch import disable, enable, register
from thrift_attn.transformers.thrift_cache import ThriftCache

__all__ = ["ThriftCache", "disable", "enable", "register", "report"]
