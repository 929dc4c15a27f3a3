"""What fits on a GPU: tokens of a KV cache beside a model's weights, and how long a step of decode takes to read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrift_attn import ThriftConfig
from thrift_lab.eval.config_cost import decode_cost, stored_share

GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """What a model's KV cache and weights take.

    Args:
        name: of the model.
        layers: with full attention.
        kv_heads: Hkv.
        head_dim: D.
        weights: bytes of the weights.
        longest: tokens that the model was made for.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    weights: float
    longest: int = 0

    @property
    def bytes_per_token(self) -> int:
        """Of a 16-bit cache."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    @classmethod
    def of(cls, config: Any, billions: float, bits: float = 16) -> Shape:
        """The shape of a model of transformers.

        Args:
            config: its configuration; every layer is counted as full attention.
            billions: of its parameters.
            bits: of a weight.
        """
        heads = config.num_attention_heads
        return cls(
            name=config.model_type,
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            weights=billions * 1e9 * bits / 8,
            longest=getattr(config, "max_position_embeddings", 0),
        )


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Args:
        name: of it.
        memory: bytes.
        bandwidth: bytes a second that a kernel reads.
        spare: bytes for activations and all else.
    """

    name: str
    memory: float
    bandwidth: float
    spare: float = 4 * GIB


@dataclass(frozen=True)
class Fit:
    """What a kind of cache gives.

    Args:
        kind: of the cache.
        bytes_per_token: kept, all layers.
        tokens: that fit beside the weights, in all sequences together.
        step_ms: to read weights and the cache of one sequence of that length once: a bound by bandwidth, not a measurement.
    """

    kind: str
    bytes_per_token: float
    tokens: int
    step_ms: float


CACHE = ThriftConfig.for_cache(budget=0.05)


def fits(shape: Shape, gpu: Gpu, config: ThriftConfig = CACHE) -> list[Fit]:
    """A 16-bit cache, an FP8 cache and ours beside the weights of a model.

    Args:
        shape: the model.
        gpu: the GPU.
        config: of our cache; its budget a share.

    Raises:
        ValueError: the weights alone do not fit.
    """
    room = gpu.memory - gpu.spare - shape.weights
    if room <= 0:
        raise ValueError(
            f"{shape.name} needs {shape.weights / GIB:.1f} GiB for its weights, {gpu.name} has "
            f"{(gpu.memory - gpu.spare) / GIB:.1f} GiB beside what is spared"
        )
    share = config.budget.value
    kinds = {"16 bits": (1.0, 1.0), "FP8": (0.5, 0.5)}
    kinds[f"thrift, {share:.0%}"] = (stored_share(config, shape.head_dim), decode_cost(config, share, shape.head_dim))
    found = []
    for kind, (kept, reads) in kinds.items():
        tokens = int(room / (kept * shape.bytes_per_token))
        read = shape.weights + tokens * reads * shape.bytes_per_token
        found.append(Fit(kind, kept * shape.bytes_per_token, tokens, read / gpu.bandwidth * 1e3))
    return found
