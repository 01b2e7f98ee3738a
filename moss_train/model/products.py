"""The product of a linear layer, by the library that is fast on this processor.

On a CPU torch hands fp32 products to MKL, which runs its AVX2 kernels on AMD's processors even
where they have AVX-512: 90 GFLOP/s a core on a Zen 5, and oneDNN, which torch ships too, 210. torch
has no public way to choose. The one workaround is here: the operator that torch's own compiler
emits for linear layers (`torch.ops.mkldnn._linear_pointwise`), which knows no gradient.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional


@cache
def onednn_is_faster() -> bool:
    """True on an AMD processor with AVX-512, of the kinds where torch has the operator."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    processor = Path("/proc/cpuinfo")
    return processor.exists() and "AuthenticAMD" in processor.read_text()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: `[..., in]`, `[out, in]`, `[out]` -> `[..., out]`."""
    plain = x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() > 0
    if plain and onednn_is_faster():
        return _Linear.apply(x, weight, bias)
    return functional.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of matrices of any strides; a transposed x is copied first."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _weight_gradient(rows: Tensor, x: Tensor) -> Tensor:
    """`rows.T @ x`; the narrower of the two is the one that is copied."""
    if rows.shape[1] > x.shape[1]:
        return _product(x.T, rows.T).T
    return _product(rows.T, x.T)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _product(rows, weight.T).view(x.shape) if wants_x else None,
            _weight_gradient(rows, x.flatten(0, -2)) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )
