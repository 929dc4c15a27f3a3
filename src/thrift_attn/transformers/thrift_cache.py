"""`ThriftCache`: the KV cache of a transformers model in 4 bits and a budget, for ``past_key_values=``.

    from thrift_attn.transformers.attention_function import ThriftCache, enable

    enable(model)
    model.generate(**inputs, past_key_values=ThriftCache(model.config, max_tokens=131072))

Full-attention layers are paged (`thrift_attn.cache.PagedThriftCache`), sliding-window layers are those of transformers. Pages
hold tokens, no padding: rows of unequal length cost what they hold.

How attention reaches the pages. ``update`` returns two tensors of the class `Cached`, which have the shape of K and V but no
data. The attention that `enable` puts in takes the pages from them. Any other operation on them widens the pages to 16 bits
first, so a model or a layer that computes its attention otherwise gets right numbers, only without the speed.

What is computed:

- the first tokens of a sequence: `thrift_attn.attention` on the K and V that the model has just made, with ``prefill``;
- up to 16 new tokens: the decode kernels over the pages, with ``decode``;
- more new tokens on a cache that holds some: the pages are widened, layer by layer, for `thrift_attn.attention`.

An interrupted forward leaves tokens in the first layers that the others lack. `get_seq_length` counts those that all layers
hold, and the next forward takes the others back.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thrift_attn.cache import PagedThriftCache
from thrift_attn.cache.paged import DEFAULT
from thrift_attn.config import BLOCK, Budget, ThriftConfig, fraction
from thrift_attn.reference.budget import decode_budget
from thrift_attn.stats import Stats
from thrift_attn.transformers.lazy_kv import Cached, Padding, Step, gather

try:
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
except ImportError as error:
    raise ImportError('ThriftCache needs transformers >= 5.0: pip install "thrift-attn[hf]"') from error


def default_prefill(device: torch.device, decode: ThriftConfig) -> ThriftConfig:
    """What a prompt is attended with: FP4 on Blackwell, FP8 on Ada and Hopper, elsewhere as in decode."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (10, 0):
            return ThriftConfig(budget=decode.budget)
        if capability >= (8, 9):
            return ThriftConfig(base_format="fp8", budget=decode.budget)
    return decode


# -- one layer --------------------------------------------------------------------------------------------------------


class ThriftLayer(CacheLayerMixin):
    """One full-attention layer of a `ThriftCache`.

    A slot is a position of the batch as transformers counts, padding included; ``slots`` is their number.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, owner: ThriftCache):
        super().__init__()
        self.owner = owner
        self.slots = 0
        self.paddings: list[Padding] = []
        self._paged: PagedThriftCache | None = None

    @property
    def paged(self) -> PagedThriftCache:
        """The pages. Raises RuntimeError before the first token."""
        if self._paged is None:
            raise RuntimeError("the cache is empty: its pages are made when the first tokens arrive")
        return self._paged

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pages, for the batch, heads, dtype and device of the first tokens."""
        batch, heads, _, dim = key_states.shape
        if key_states.shape[:2] != value_states.shape[:2] or dim != value_states.shape[3]:
            raise NotImplementedError(
                f"ThriftCache holds K and V of one shape, got {list(key_states.shape)} and {list(value_states.shape)}"
            )
        sizes = self.owner
        most = -(-sizes.max_tokens // BLOCK)
        pages = batch * most if sizes.pool_tokens is None else -(-sizes.pool_tokens // BLOCK)
        self._paged = PagedThriftCache(
            batch=batch,
            kv_heads=heads,
            head_dim=dim,
            num_pages=pages,
            max_pages=most,
            config=sizes.decode,
            dtype=key_states.dtype,
            device=key_states.device,
        )
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new K and V ``[B, Hkv, T, D]``; they are written when attention, or another operation, looks at them."""
        if self._paged is not None and self.slots == 0 and self._paged.batch != key_states.shape[0]:
            self._paged = None  # emptied by `reset`: the next batch may have another size
        if self._paged is None:
            self.lazy_initialization(key_states, value_states)
        paged = self.paged
        want = (paged.batch, paged.kv_heads, key_states.shape[2], paged.head_dim)
        if key_states.shape != want or value_states.shape != want:
            got = f"{list(key_states.shape)} and {list(value_states.shape)}"
            raise ValueError(f"K and V must have shape {list(want)} like the tokens before them, got {got}")
        step = Step(self, key_states, value_states)
        return Cached(step, 0), Cached(step, 1)

    def append(self, k: Tensor, v: Tensor, padding: Padding | None) -> None:
        """Write new tokens ``[B, Hkv, T, D]``, without their padding, into the pages."""
        if padding is None:
            self.paged.append(k, v)
        else:
            index = padding.left()
            self.paged.append(gather(k, index), gather(v, index), lengths=padding.counts)
        if not _capturing(k):
            self.slots += k.shape[2]
            if padding is not None:
                self.paddings.append(padding)

    def tokens(self, row: int) -> int:
        """Tokens of a row, without padding."""
        return self.paged.tokens(row) if self._paged is not None else 0

    def holds(self, tokens: Tensor, held: int) -> bool:
        """Whether a mask ``[B, slots]`` shows all tokens that the rows hold among the ``held`` slots before.

        Raises:
            ValueError: it shows more than they hold.
        """
        shown, there = self.owner.shown(tokens, held), [self.tokens(row) for row in range(tokens.shape[0])]
        if any(seen > own for seen, own in zip(shown, there, strict=True)):
            raise ValueError(f"the attention mask shows {shown} tokens before the new ones, the cache holds {there}")
        return shown == there

    def slot_map(self) -> Tensor | None:
        """bool ``[B, slots]``, True at tokens; None if there is no padding."""
        if not self.paddings:
            return None
        found = torch.ones(self.paged.batch, self.slots, dtype=torch.bool, device=self.device)
        for padding in self.paddings:
            found[:, padding.start : padding.start + padding.is_token.shape[1]] = padding.is_token
        return found

    def decode_stats(self, heads: int) -> Stats:
        """Complete blocks seen and promoted by one decode step of ``heads`` query heads."""
        blocks = [self.tokens(row) // BLOCK for row in range(self.paged.batch)]
        asked = sum(self.owner.asked_blocks(n) for n in blocks)
        return Stats(heads * sum(blocks), heads * sum(self.owner.promoted_blocks(n) for n in blocks), heads * asked)

    # -- what transformers asks ----------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Slots."""
        return self.slots

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Slots after the new tokens, and the first of them; transformers 5.0 gives positions, later a number."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.owner.get_seq_length() + new, 0

    def get_max_length(self) -> int:
        """Most tokens of a row."""
        return self.owner.max_tokens

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def reset(self) -> None:
        """Give all pages back; they stay allocated for the next sequences."""
        if self._paged is not None:
            for row in range(self._paged.batch):
                self._paged.free(row)
        self.slots, self.paddings = 0, []

    def crop(self, tokens_to_remove: int) -> None:
        """Take slots back from the end: ``-n`` takes n, and ``n``, as in transformers 5.0, leaves n."""
        keep = self.slots + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self.keep(max(0, keep))

    def keep(self, slots: int) -> None:
        """Keep the first ``slots`` slots."""
        if slots >= self.slots or self._paged is None:
            return
        found = self.slot_map()
        left = [slots] * self.paged.batch if found is None else found[:, :slots].sum(1).tolist()
        for row, tokens in enumerate(left):
            self.paged.truncate(row, tokens)
        kept = [padding for padding in self.paddings if padding.start < slots]
        self.paddings = []
        for padding in kept:
            is_token = padding.is_token[:, : slots - padding.start]
            self.paddings.append(Padding(padding.start, is_token, is_token.sum(1).tolist()))
        self.slots = slots

    def select(self, rows: list[int]) -> None:
        """Make row i what row ``rows[i]`` was; equal rows share their complete blocks."""
        if self._paged is None:
            return
        self._paged.select(rows)
        index = torch.tensor(rows, device=self.device)
        self.paddings = [
            Padding(padding.start, padding.is_token[index], [padding.counts[row] for row in rows])
            for padding in self.paddings
        ]
        self.batch_size = len(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, some perhaps several times."""
        self.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self.select([row for row in range(self.paged.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        rows = torch.arange(self.paged.batch)[torch.as_tensor(indices).cpu()]
        self.select(rows.tolist())

    def offload(self) -> None:
        """Refuse: pages stay where they are."""
        raise NotImplementedError("ThriftCache does not move pages to the CPU")

    def fork(self, owner: ThriftCache) -> ThriftLayer:
        """The same tokens over the same pages, for another cache."""
        other = ThriftLayer(owner)
        vars(other).update({name: value for name, value in vars(self).items() if name not in ("owner", "_paged")})
        other.paddings = list(self.paddings)
        other._paged = None if self._paged is None else self._paged.branch()
        return other


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# -- all layers -------------------------------------------------------------------------------------------------------


class ThriftCache(Cache):
    """KV cache of a model for `transformers`: paged in two precisions, for ``past_key_values=``.

    Args:
        config: of the model. Layers of full attention are paged, sliding-window layers are those of transformers.
        max_tokens: most tokens of a sequence, rounded up to blocks of 64.
        pool_tokens: tokens for which there are pages in every layer, all sequences together; by default ``max_tokens`` for
            each sequence of the first batch. Sequences that share a prefix need its pages once.
        decode: what is stored, and computed for up to 16 new tokens.
        prefill: what longer prompts are attended with; by default FP4 on Blackwell, FP8 on Ada and Hopper, else ``decode``.
        exact_tokens: prompts of sequences up to this length are attended with every block in high precision: there is
            nothing to gain, and a share of few blocks is none.

    The pages are allocated when the first tokens arrive. ``copy.deepcopy`` of a cache is `fork`: pages are shared.

    Raises:
        TypeError: a config of another kind.
        ValueError: sizes out of range.
        NotImplementedError: a layer that is neither full nor sliding-window attention, or a head dimension that pages
            cannot hold.

    Example:
        >>> from transformers import LlamaConfig
        >>> ThriftCache(LlamaConfig(num_hidden_layers=2), max_tokens=4096).get_seq_length()
        0
    """

    layers: list[Any]

    def __init__(
        self,
        config: Any,
        max_tokens: int,
        *,
        pool_tokens: int | None = None,
        decode: ThriftConfig = DEFAULT,
        prefill: ThriftConfig | None = None,
        exact_tokens: int = 1024,
    ):
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be that of a transformers model, got {type(config).__name__}")
        for name, size in (("max_tokens", max_tokens), ("pool_tokens", pool_tokens)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        text = config.get_text_config(decoder=True)
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if dim % 16:
            raise NotImplementedError(f"ThriftCache needs a head dimension that is a multiple of 16, got {dim}")
        self.max_tokens, self.pool_tokens = max_tokens, pool_tokens
        self.decode, self.prefill, self.exact_tokens = decode, prefill, exact_tokens
        self._budget: list[int] = []
        self._read: tuple[Tensor, int, list[int], Padding | None] | None = None
        kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise NotImplementedError(
                f"ThriftCache serves full and sliding-window attention; {type(text).__name__} has layers of "
                f"{', '.join(sorted(kinds))}"
            )
        layers: list[Any] = DynamicCache(config=config).layers
        for at, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[at] = ThriftLayer(self)
            elif type(layer) is not DynamicSlidingWindowLayer:
                raise NotImplementedError(
                    f"ThriftCache serves full and sliding-window attention; {type(text).__name__} needs a "
                    f"{type(layer).__name__} for layer {at}"
                )
        super().__init__(layers=layers)

    @property
    def paged_layers(self) -> list[ThriftLayer]:
        """The layers whose K and V lie in pages."""
        return [layer for layer in self.layers if isinstance(layer, ThriftLayer)]

    def prefill_on(self, device: torch.device, tokens: int | None = None) -> ThriftConfig:
        """What a prompt is attended with on a device: a long one, or one of so many tokens."""
        config = self.prefill or default_prefill(device, self.decode)
        return config if tokens is None or tokens > self.exact_tokens else config.with_(budget=fraction(1.0))

    # -- used by the layers --------------------------------------------------------------------------------------------

    def padding_of(self, tokens: Tensor | None, held: int, count: int) -> Padding | None:
        """The padding among ``count`` new slots after ``held`` others, None if there is none; see `Step.attend`."""
        return None if tokens is None else self._look(tokens, held, count)[3]

    def shown(self, tokens: Tensor, held: int) -> list[int]:
        """Tokens of each row that a mask shows among the ``held`` slots before the new ones."""
        return self._look(tokens, held, tokens.shape[1] - held)[2]

    def _look(self, tokens: Tensor, held: int, count: int) -> tuple[Tensor, int, list[int], Padding | None]:
        """Read a mask, once for all layers of a forward: they get the same tensor."""
        if self._read is None or self._read[0] is not tokens or self._read[1] != held:
            new = tokens[:, held : held + count]
            shown, counts = torch.stack([tokens[:, :held].sum(1), new.sum(1)]).tolist()
            padding = None if min(counts) == count else Padding(held, new, counts)
            self._read = (tokens, held, shown, padding)
        return self._read

    def promoted_blocks(self, blocks: int) -> int:
        """Blocks that decode promotes among so many complete ones."""
        if blocks >= len(self._budget):
            self._budget = decode_budget(self.decode.budget, max(64, 2 * blocks)).tolist()
        return self._budget[blocks]

    def asked_blocks(self, blocks: int) -> float:
        """The same before rounding."""
        budget: Budget = self.decode.budget
        return budget.value * blocks if budget.kind == "fraction" else self.promoted_blocks(blocks)

    # -- what transformers calls ---------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Hand new K and V to a layer; the first layer of a forward takes back what an interrupted one has left."""
        if layer_idx == 0:
            self._mend()
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots (tokens and padding) that all layers hold."""
        return min(layer.get_seq_length() for layer in self.layers)

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Slots that a layer attends to and the first of them."""
        layer, there = self.layers[layer_idx], self.get_seq_length()
        if layer.get_seq_length() != there and not isinstance(layer, ThriftLayer):
            raise RuntimeError(
                f"an interrupted forward left tokens in sliding-window layer {layer_idx}: call crop(0), or reset()"
            )
        return layer.get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Take slots back from the end of all layers: ``-n`` takes n, and ``n``, as in transformers 5.0, leaves n."""
        self._mend()
        there = self.get_seq_length()
        keep = max(0, there + tokens_to_remove) if tokens_to_remove <= 0 else min(there, tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, ThriftLayer):
                layer.keep(keep)
            elif keep < there or getattr(layer, "record_past", False):
                layer.crop(keep - there)

    def _mend(self) -> None:
        """Take back what not all layers hold."""
        there = self.get_seq_length()
        for at, layer in enumerate(self.layers):
            extra = layer.get_seq_length() - there
            if extra and isinstance(layer, ThriftLayer):
                layer.keep(there)
            elif extra:
                try:
                    layer.crop(-extra)
                except RuntimeError as error:
                    raise RuntimeError(
                        f"an interrupted forward left {extra} tokens in sliding-window layer {at} that it cannot take "
                        f"back: call reset() and start again"
                    ) from error

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes what row ``beam_idx[i]`` was; complete blocks are shared."""
        super().reorder_cache(beam_idx.cpu())

    # -- growing, sharing, saving --------------------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Give every sequence of every layer the pages for ``tokens`` more tokens, for steps that a graph replays.

        Raises:
            ValueError: more tokens than a sequence may have.
            RuntimeError: the pages are exhausted.
        """
        for layer in self.paged_layers:
            layer.paged.reserve(tokens)

    def advance(self, tokens: int) -> None:
        """Note that a replayed graph has appended ``tokens`` tokens to every sequence."""
        for layer in self.paged_layers:
            layer.paged.advance(tokens)
            layer.slots += tokens

    def tokens(self, row: int) -> int:
        """Tokens of a sequence, without padding."""
        return min((layer.tokens(row) for layer in self.paged_layers), default=0)

    def fork(self) -> ThriftCache:
        """Another cache that begins with what this one holds: complete blocks are shared, what follows is its own.

        A prompt that several generations begin with is computed and stored once. The pages of a fork go back to the pool
        when it is dropped or `reset`.
        """
        other = copy.copy(self)
        other._read = None
        other.layers = [
            layer.fork(other) if isinstance(layer, ThriftLayer) else copy.copy(layer) for layer in self.layers
        ]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> ThriftCache:
        return self.fork()

    def nbytes(self) -> int:
        """Bytes that the cache has allocated on its devices."""
        paged = sum(layer.paged.nbytes() for layer in self.paged_layers if layer.is_initialized)
        others = [layer for layer in self.layers if not isinstance(layer, ThriftLayer) and layer.is_initialized]
        return paged + sum(x.numel() * x.element_size() for layer in others for x in (layer.keys, layer.values))

    def bytes_per_token(self) -> float:
        """Bytes of pages for one token in all paged layers."""
        return sum(layer.paged.bytes_per_token() for layer in self.paged_layers)

    def save(self, path: str | Path) -> None:
        """Write what the cache holds to a safetensors file; see `thrift_attn.transformers.files`."""
        from thrift_attn.transformers import files

        self._mend()
        files.save(self, path)

    def load(self, path: str | Path, device: torch.device | str = "cpu") -> ThriftCache:
        """Fill this cache, which must be empty, from a file on a device; see `thrift_attn.transformers.files`."""
        from thrift_attn.transformers import files

        files.load(self, path, device)
        return self
