"""The gradient of a linear layer's weight, in a tensor of its own or added up in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAIN = "main_grad"  # where megatron adds up a parameter's gradient in fp32
Accumulate = Callable[[Tensor, Tensor, Tensor], None]


def weight_gradient(weight: Any, grad: Tensor, x: Tensor, add: Accumulate | None) -> Tensor:
    """`grad.T @ x` of `[..., out]` and `[..., in]`, for autograd.

    add: adds it to the weight's `main_grad` in the product, so that no product writes a gradient in
    bf16 which another operator reads and adds; None: it is returned.
    """
    rows, x = grad.flatten(0, -2), x.flatten(0, -2)
    if add is None or not hasattr(weight, MAIN):
        return rows.T @ x
    add(weight.main_grad, rows, x)
    # As megatron's layers tell its data parallelism: what else arrives is not to be added.
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def accumulate(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Adds `grad.T @ x` of `[n, out]` and `[n, in]` to `total` `[out, in]` in fp32."""
    if grad.dtype is total.dtype:
        total.addmm_(grad.T, x)
    else:  # torch has it for GPUs, from 2.8 on
        torch.addmm(total, grad.T, x, out_dtype=total.dtype, out=total)
