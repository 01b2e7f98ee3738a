"""What a simulated GPU (simulated_cuda.py) has to know of torch's operators; its RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Operators that cannot be launched before the host knows some values.
VALUE_DEPENDENT = {
    aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.unique_dim,
    aten.bincount, aten.is_nonzero, aten.equal, aten._local_scalar_dense, aten.repeat_interleave,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# What launches nothing: memory, shapes, and what only autograd sees.
FREE = {
    aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided,
    aten.detach, aten.view, aten._unsafe_view, aten.alias, aten.lift_fresh, aten._reshape_alias,
    aten.set_, aten.resize_,
}  # fmt: skip
# torch.distributed's functions of Python objects: over NCCL it brings their bytes to the device.
OBJECTS = {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}
UNSET = ("empty", "empty_like", "new_empty", "empty_strided")

AsKernels = Callable[[int], AbstractContextManager[None]]  # counts so many, and nothing within


def rms_norm(
    kernels: AsKernels,
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """As torch.nn.functional.rms_norm: a kernel forward and two backward. Without a GPU torch takes
    it apart into operators."""
    result: Tensor = _Norm.apply(kernels, x, tuple(shape), weight, eps)
    return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: AsKernels, x: Tensor, shape: Any, weight: Any, eps: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernels, ctx.how = kernels, (shape, eps)
        with kernels(1), torch._C.DisableTorchFunction():
            return torch.nn.functional.rms_norm(x, shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        shape, eps = ctx.how
        with ctx.kernels(2), torch._C.DisableTorchFunction(), torch.enable_grad():
            given = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
            own = given[1] if weight is not None else None
            out = torch.nn.functional.rms_norm(given[0], shape, own, eps)
            found = torch.autograd.grad(out, given, grads[0])
        return None, found[0], None, *(found[1:] or [None]), None
