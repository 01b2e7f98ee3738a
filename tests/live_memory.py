"""The memory of a simulated GPU (simulated_cuda.py): bytes of all tensors that are there at once.

Matrix products, which nobody reads here, are zeros: in bf16 a CPU would take minutes for them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from tests import simulated_cuda

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


class LiveMemory:
    """Counts what is made on the device from now on.

    now, peak: bytes.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._there: dict[int, Any] = {}
        plain_set, plain_run = simulated_cuda._set, simulated_cuda._Operators._run

        def put(x: Tensor, mark: str) -> Tensor:
            out = plain_set(x, mark)
            if mark == "device":
                self._add(out)
            return out

        def run(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
            if func not in PRODUCTS:
                return plain_run(mode, func, args, kwargs)
            left, right = args[-2:]
            return put(left.new_zeros(*left.shape[:-1], right.shape[-1]), "device")

        patched: Any = simulated_cuda
        patched._set, patched._Operators._run = put, run

    def restart(self) -> None:
        """The peak begins anew."""
        self.peak = self.now

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._there:
            return

        def gone(_: Any) -> None:
            del self._there[key]
            self.now -= size

        self._there[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
