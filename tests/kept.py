"""What autograd keeps between a forward and a backward pass."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Kept(saved_tensors_hooks):
    """Counts the bytes that graphs keep which are made while it is entered.

    now, peak: bytes of storages; each once, however many nodes keep it. Those of `parameters` do
    not count.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()):
        self.now = self.peak = 0
        weights = {x.untyped_storage()._cdata for x in parameters}
        holders: Counter[int] = Counter()

        def pack(x: Tensor) -> _Holder:
            holder, storage = _Holder(x), x.untyped_storage()
            if storage._cdata not in weights:
                if not holders[storage._cdata]:
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                holders[storage._cdata] += 1
                weakref.finalize(holder, release, storage._cdata, storage.nbytes())
            return holder

        def release(storage: int, size: int) -> None:
            holders[storage] -= 1
            if not holders[storage]:
                self.now -= size

        super().__init__(pack, lambda holder: holder.x)


class _Holder:
    def __init__(self, x: Tensor):
        self.x = x
