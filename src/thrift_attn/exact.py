"""Exact attention by what is installed: FlashAttention-3 on Hopper, else PyTorch's own (SDPA).

`thrift_attn.dispatch` decides when; here stands what each of them can serve with the semantics of `thrift_attn.attention`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thrift_attn.config import BLOCK, DECODE_ROWS
from thrift_attn.crossovers import Server
from thrift_attn.stats import Stats

FEW = 256
"""Queries up to which PyTorch's own attention of a chunk was measured to be faster than thrift (65,536 keys, H100)."""

FA3_HEAD_DIMS = (64, 96, 128, 256)
"""Head dims that FlashAttention-3 has kernels for."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is known of a call of `thrift_attn.attention` without looking at its data.

    Args:
        device: where its tensors are.
        dtype: of them.
        head_dim: D.
        queries: Tq.
        keys: Tk.
        causal: whether a query sees only keys up to its own position.
        window: of `thrift_attn.attention`.
        softcap: likewise.
        lse: whether the log-sum-exp is asked for.
        packed: whether sequences lie end to end, so that only the device knows their lengths.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    lse: bool = False
    packed: bool = False

    def is_prompt_for(self, by: Server) -> bool:
        """Whether what has been measured, whole causal prompts, speaks for the call.

        PyTorch hands chunks of a prompt to FlashAttention-2, which is slower than what it has for whole ones, and faster than
        thrift for chunks of a few tokens only (`FEW`).
        """
        return self.causal and (by != "SDPA" or self.queries == self.keys or self.queries <= FEW)


def exact_server(call: Call) -> Server:
    """Who computes a call exactly: FlashAttention-3 if it is there and serves the call, else SDPA."""
    return "FlashAttention-3" if _why_not_fa3(call) is None else "SDPA"


def why_not_exact(call: Call) -> str | None:
    """Why nobody computes a call exactly as `thrift_attn.attention` defines it; None if somebody does."""
    if call.packed:
        return "sequences packed end to end go to the kernels of thrift"
    if call.window is not None:
        return "windows go to the kernels of thrift"
    if min(call.queries, call.keys) < 1 or (call.causal and call.queries > call.keys):
        return "queries without keys go to the kernels of thrift"
    return None if _why_not_fa3(call) is None else _why_not_sdpa(call)


def exact_stats(call: Call, heads: int) -> Stats:
    """`Stats` of a call that is computed exactly: every visible pair counts as promoted.

    Args:
        call: without a window, and with no query before position 0.
        heads: query heads of all sequences.
    """
    blocks = -(-call.keys // BLOCK)
    if call.queries <= DECODE_ROWS:  # one list for all of them
        visible = blocks
    elif call.causal:
        first = (call.keys - call.queries) // BLOCK  # of the blocks that hold a query, each of which is a row
        visible = sum(range(first + 1, blocks + 1))
    else:
        visible = -(-call.queries // BLOCK) * blocks
    pairs, rows = heads * visible, heads * call.queries
    return Stats(pairs, pairs, pairs, float(rows), rows, exact=pairs)


def attend_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    softcap: float | None = None,
    lse: bool = False,
    by: Server | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention of a call that `why_not_exact` has nothing against.

    Args:
        q: ``[B, Hq, Tq, D]``.
        k: ``[B, Hkv, Tk, D]``.
        v: the shape of ``k``.
        causal: whether queries, right-aligned with the keys, see no later keys.
        scale: factor of the logits.
        softcap: of `thrift_attn.attention`.
        lse: whether to return the log-sum-exp.
        by: who is to compute it; None: `exact_server`.

    Returns:
        The output ``[B, Hq, Tq, D]``, and the log-sum-exp float32 ``[B, Hq, Tq]`` or None.
    """
    call = Call(
        device=q.device, dtype=q.dtype, head_dim=q.shape[3], queries=q.shape[2], keys=k.shape[2], causal=causal,
        softcap=softcap, lse=lse,
    )  # fmt: skip
    if (by or exact_server(call)) == "FlashAttention-3":
        return _fa3_attend(q, k, v, causal=causal, scale=scale, softcap=softcap, lse=lse)
    return _sdpa_attend(q, k, v, causal=causal, scale=scale), None


# -- SDPA ---------------------------------------------------------------------------------------------------------------


def _why_not_sdpa(call: Call) -> str | None:
    if call.softcap is not None:
        return "SDPA has no softcap"
    return "SDPA returns no log-sum-exp" if call.lse else None


def _sdpa_attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if not causal or queries == 1:
        return F.scaled_dot_product_attention(q, k, v, **options)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    if q.device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right

        bias: Any = causal_lower_right(queries, keys)
    else:
        bias = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)


# -- FlashAttention-3 ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def fa3() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """``flash_attn_func`` of FlashAttention-3 and the features it was built without; None if it is not installed or broken.

    Either of its packages: the forward-only wheel (``fa3-fwd``), or FlashAttention's own build; in a process of vLLM the build
    that vLLM brings.
    """
    for name, flags in (("fa3_fwd_interface", "fa3_fwd_config"), ("flash_attn_interface", "flash_attn_config")):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            call = importlib.import_module(name).flash_attn_func
        except Exception:  # a binary for another torch raises OSError, RuntimeError and others
            continue
        try:
            built: dict[str, bool] = importlib.import_module(flags).CONFIG["build_flags"]
        except Exception:  # a build that does not tell: only what every build has is used
            return call, frozenset({"FP16", "SOFTCAP"})
        lacking = {key.removeprefix("FLASHATTENTION_DISABLE_") for key, off in built.items() if off}
        return call, frozenset(lacking)
    return _of_vllm() if "vllm" in sys.modules else None


def _of_vllm() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """The same of vLLM's build, which has all features and takes packed sequences only."""
    try:
        found = importlib.import_module("vllm.vllm_flash_attn")
        there = found.is_fa_version_supported(3)
    except Exception:  # a vLLM without CUDA, or a binary for another torch
        return None
    return (partial(_packed, found.flash_attn_varlen_func), frozenset()) if there else None


def _packed(
    call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *, return_attn_probs: bool, **options: Any
) -> Any:
    """``flash_attn_func`` by a function of packed sequences: ``[B, T, H, D]``, the log-sum-exp ``[B, H, T]``."""
    batch, tq = q.shape[:2]
    starts_q, starts_k = (
        torch.arange(batch + 1, dtype=torch.int32, device=q.device) * x.shape[1] for x in (q, k)
    )  # nothing is copied from the host
    result = call(
        *(x.flatten(0, 1) for x in (q, k, v)), max_seqlen_q=tq, cu_seqlens_q=starts_q, max_seqlen_k=k.shape[1],
        cu_seqlens_k=starts_k, return_softmax_lse=return_attn_probs, fa_version=3, **options,
    )  # fmt: skip
    if not return_attn_probs:
        return result.unflatten(0, (batch, tq))
    return result[0].unflatten(0, (batch, tq)), result[1].unflatten(1, (batch, tq)).transpose(0, 1)


def _why_not_fa3(call: Call) -> str | None:
    if call.device.type != "cuda" or torch.cuda.get_device_capability(call.device) != (9, 0):
        return "FlashAttention-3 needs compute capability 9.0"
    if call.dtype not in (torch.float16, torch.bfloat16) or call.head_dim not in FA3_HEAD_DIMS:
        return f"FlashAttention-3 takes 16-bit tensors of head dim {', '.join(map(str, FA3_HEAD_DIMS))}"
    found = fa3()
    if found is None:
        return "FlashAttention-3 is not installed"
    needs = {f"HDIM{call.head_dim}"} | ({"FP16"} if call.dtype == torch.float16 else set())
    lacks = found[1] & (needs | ({"SOFTCAP"} if call.softcap is not None else set()))
    if lacks:
        return f"this build of FlashAttention-3 lacks {', '.join(sorted(lacks))}"
    return None


def _fa3_attend(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, softcap: float | None, lse: bool
) -> tuple[Tensor, Tensor | None]:
    found = fa3()
    assert found is not None
    tokens_first = (x.transpose(1, 2) for x in (q, k, v))
    result = found[0](
        *tokens_first, softmax_scale=scale, causal=causal, softcap=softcap or 0.0, return_attn_probs=lse
    )  # fmt: skip
    out, sums = (result[0], result[1]) if isinstance(result, tuple) else (result, None)
    return out.transpose(1, 2), sums if lse else None
