"""Long-context attention from 4-bit data with a small budget of high-precision blocks."""

from thrift_attn.combine import merge
from thrift_attn.config import BLOCK, Budget, ThriftConfig, floored, fraction, paper, top_k
from thrift_attn.dispatch import support
from thrift_attn.interface import attention, attention_varlen
from thrift_attn.stats import Stats

__version__ = "0.1.0"

__all__ = [
    "BLOCK",
    "Budget",
    "Stats",
    "ThriftConfig",
    "attention",
    "attention_varlen",
    "floored",
    "fraction",
    "merge",
    "paper",
    "support",
    "top_k",
]
