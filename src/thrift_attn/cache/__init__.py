"""KV cache in two precisions."""

from thrift_attn.cache.paged import PagedThriftCache

__all__ = ["PagedThriftCache"]
