"""Linear layers that compute in FP8 (`model.fp8`): their output and the gradient of their input.

The gradient of a weight, a sum over all tokens, stays in bf16, as do the master weights, norms,
attention, residual stream and loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data_pipeline.fp8 import Fp8, Rounded
from moss_train.model.weight_gradient import Accumulate, weight_gradient


def linear_fp8(
    fp8: Fp8,
    x: Tensor | Rounded,
    weight: Tensor,
    bias: Tensor | None = None,
    add: Accumulate | None = None,
) -> Tensor:
    """`[..., in]`, `[out, in]`, `[out]` -> `[..., out]`; in and out are multiples of 16.

    x: `Rounded` where no gradient is wanted. add: `Kernels.accumulate`.
    """
    if isinstance(x, Rounded):
        return fp8.product(x, fp8.round(weight), bias, True)
    result: Tensor = _Linear.apply(fp8, x, weight, bias, add)
    return result


class _Linear(torch.autograd.Function):
    """Keeps x as a plain linear layer does."""

    @staticmethod
    def forward(ctx, fp8: Fp8, x: Tensor, weight: Tensor, bias: Tensor | None, add: Any):
        ctx.save_for_backward(x)
        # Not saved as x is: see linear.py.
        ctx.fp8, ctx.weight, ctx.add = fp8, weight, add
        return fp8.product(fp8.round(x), fp8.round(weight), bias, True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), weight, fp8 = ctx.saved_tensors, ctx.weight, ctx.fp8
        to_x, to_weight, to_bias = None, None, None
        if ctx.needs_input_grad[1]:
            columns = fp8.round(weight.T.contiguous())
            to_x = fp8.product(fp8.round(grad.contiguous()), columns, None, False)
        if ctx.needs_input_grad[2]:
            to_weight = weight_gradient(weight, grad, x, ctx.add)
        if ctx.needs_input_grad[3]:
            to_bias = grad.flatten(0, -2).sum(0)
        return None, to_x, to_weight, to_bias, None
