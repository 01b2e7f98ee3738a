"""Linear layers whose three matrix products run in FP8 (`model.fp8`).

Values and weights are rounded to e4m3 (3 bits behind the point, up to 448), gradients to e5m2 (2
bits, up to 57,344), each tensor by one factor that its largest element sets (Micikevicius et al.
2022, "FP8 formats for deep learning"). Factors are powers of two, so that scaling is exact and a
value is rounded once: by at most 2^-4 and 2^-3 of it, or half of the type's smallest step. Products
are summed in fp32; the master weights, all norms, attention, residual stream and loss stay as they
are. A GPU multiplies by `torch._scaled_mm`, a CPU the same rounded numbers in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from data_pipeline.devices import is_accelerator

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of what a product sums over, as hardware wants it
_EXPONENT = 0x7F800000  # the bits of an fp32 number that say its power of two


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` as `values * scale`: values of `dtype`, shaped as x; scale an fp32 scalar."""
    most = torch.linalg.vector_norm(x, torch.inf).float().clamp(min=1e-30)
    factor = torch.finfo(dtype).max / most
    factor = factor.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)  # rounded down
    return (x * factor.to(x.dtype)).to(dtype), factor.reciprocal()


def multiply(
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """Product of what `quantize` gave: `[m, k]`, rows one after the other, and `[k, n]`, columns
    one after the other -> `[m, n]` of `dtype`, with `bias` `[n]`. fast: sums keep 14 bits or so.
    """
    (a, scale_a), (b, scale_b) = left, right
    if not is_accelerator(a):
        return emulated(left, right, dtype, bias)
    return torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


def emulated(
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """The same on any device, in fp32."""
    (a, scale_a), (b, scale_b) = left, right
    out = (a.float() @ b.float()) * (scale_a * scale_b)
    return (out if bias is None else out + bias).to(dtype)


def linear_fp8(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., in]`, `[out, in]`, `[out]` -> `[..., out]`; in and out are multiples of 16."""
    return _Linear.apply(x, weight, bias, multiply)


def linear_emulated(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_fp8` with `emulated` products."""

    def product(left: Any, right: Any, dtype: torch.dtype, bias: Any = None, fast: bool = False):
        return emulated(left, right, dtype, bias)

    return _Linear.apply(x, weight, bias, product)


class _Linear(torch.autograd.Function):
    """Keeps x as a plain linear layer does, and rounds it again for the weight's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, product: Any) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved as x is: see linear.py.
        ctx.weight, ctx.product = weight, product
        values, scale = quantize(weight, VALUES)
        rows = quantize(x.flatten(0, -2), VALUES)
        out = product(rows, (values.T, scale), x.dtype, bias, True)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), weight, product = ctx.saved_tensors, ctx.weight, ctx.product
        rows, to_x, to_weight, to_bias = grad.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0)
        values, scale = quantize(rows, GRADIENTS)
        if ctx.needs_input_grad[0]:
            own, factor = quantize(weight, VALUES)
            to_x = product((values, scale), (_columns(own), factor), x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            inputs, factor = quantize(x.flatten(0, -2), VALUES)
            left, right = (_whole(t) for t in (values, inputs))
            to_weight = _weight_gradient(
                weight,
                product((left.T.contiguous(), scale), (_columns(right), factor), torch.float32),
            )
        return to_x, to_weight, to_bias, None


def _columns(x: Tensor) -> Tensor:
    """The same matrix, its columns one after the other."""
    return x.T.contiguous().T


def _whole(x: Tensor) -> Tensor:
    """With rows of zeros up to a multiple of MULTIPLE."""
    missing = -len(x) % MULTIPLE
    if not missing:
        return x
    return pad(x.view(torch.uint8), (0, 0, 0, missing)).view(x.dtype)  # no pad of FP8


def _weight_gradient(weight: Any, gradient: Tensor) -> Tensor:
    """`gradient`, in fp32, for autograd; or added to where megatron adds it up."""
    if not hasattr(weight, "main_grad"):
        return gradient.to(weight.dtype)
    weight.main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True  # as in linear.py
    return torch.empty_like(weight)
