"""Triton kernels that write FP8: a row is read once, and normed or activated on the way.

In plain torch rounding takes a pass for the largest element and two to scale and cast, 9 bytes an
element in bf16 beside the 4 of the operator before it; here both together read 2 and write 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from data_pipeline.fp8 import EXPONENT, FORMAT, LARGEST, SMALLEST, Rounded

MOST = tl.constexpr(LARGEST)
LEAST = tl.constexpr(SMALLEST)
POWER = tl.constexpr(EXPONENT)
SQRT_HALF = tl.constexpr(0.5**0.5)


@triton.jit
def _nearest(x):
    """The nearest e4m3 number, in fp32, so that the cast to it is exact wherever it runs: Triton's
    interpreter loses a carry into the exponent."""
    bits = x.to(tl.int32, bitcast=True)
    even = (bits >> 20) & 1
    normal = ((bits + 0x7FFFF + even) & -0x100000).to(tl.float32, bitcast=True)
    # Below 2^-6 steps are 2^-9, those of fp32 numbers around 2^14.
    small = (x + 24576.0) - 24576.0
    near = tl.where(tl.abs(x) < 0.015625, small, normal)
    return tl.where(x == x, near, x)  # NaN stays NaN


@triton.jit
def _store_row(x, values, scale, row, size, i):
    factor = MOST / tl.maximum(tl.max(tl.abs(x), 0), LEAST)
    factor = (factor.to(tl.int32, bitcast=True) & POWER).to(tl.float32, bitcast=True)
    near = _nearest(x * factor)
    tl.store(values + row * size + i, near.to(values.dtype.element_ty), mask=i < size)
    tl.store(scale + row, 1.0 / factor)


@triton.jit
def _load_row(x, row, size, i):
    return tl.load(x + row * size + i, mask=i < size, other=0.0).to(tl.float32)


@triton.jit
def _round(x, values, scale, size, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    _store_row(_load_row(x, row, size, i), values, scale, row, size, i)


@triton.jit
def _norm(x, weight, bias, values, scale, size, eps, BLOCK: tl.constexpr):
    """Rounded to the type of x in between, as torch's LayerNorm is."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    whole = _load_row(x, row, size, i)
    away = tl.where(i < size, whole - tl.sum(whole, 0) / size, 0.0)
    spread = tl.sum(away * away, 0) / size
    factor, offset = _load_row(weight, 0, size, i), _load_row(bias, 0, size, i)
    normed = away * tl.rsqrt(spread + eps) * factor + offset
    normed = normed.to(x.dtype.element_ty).to(tl.float32)
    _store_row(normed, values, scale, row, size, i)


@triton.jit
def _gelu(x, values, scale, size, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    whole = _load_row(x, row, size, i)
    active = 0.5 * whole * (1.0 + tl.erf(whole * SQRT_HALF))
    _store_row(active.to(x.dtype.element_ty).to(tl.float32), values, scale, row, size, i)


def _rows(kernel: Any, x: Tensor, *others: Tensor, **numbers: float) -> Rounded:
    x, size = x.contiguous(), x.shape[-1]
    values = torch.empty_like(x, dtype=FORMAT)
    scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    if x.numel():
        kernel[(x.numel() // size,)](
            x, *others, values, scale, size, **numbers, BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return Rounded(values, scale, x.dtype)


def round_rows(x: Tensor) -> Rounded:
    """As `fp8.round_rows`."""
    return _rows(_round, x)


def norm_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Rounded:
    """As `fp8.norm_rows`."""
    return _rows(_norm, x, weight, bias, eps=eps)


def gelu_rows(hidden: Tensor) -> Rounded:
    """As `fp8.gelu_rows`."""
    return _rows(_gelu, hidden)
