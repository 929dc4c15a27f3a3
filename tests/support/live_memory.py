"""How many bytes tensors take at most at a time: what a caching allocator of a GPU would be asked for, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still there. ``peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._held, self._known = 0, {}, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in before:
                self._held[key] = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return found
