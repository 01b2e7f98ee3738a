"""Triton kernels of training, forward and backward: SwiGLU, rotation, the statistics of logits.

In plain torch each is several passes over memory. In bf16, forward and backward: SwiGLU moves 32
bytes an element of its output, and here 16; a rotation 40 an element, and here 8; the cross entropy
of a vocabulary of V 36 V bytes a token, most of them in fp32, and here 6 V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
LOGITS = 4096  # of a row at once
HEADS = 8  # of a position at once


@triton.jit
def _swiglu(hidden, out, inner, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < inner
    gate = tl.load(hidden + row * 2 * inner + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * 2 * inner + inner + i, mask=inside, other=0.0).to(tl.float32)
    made = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * inner + i, made.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(hidden, grad, to_hidden, inner, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < inner
    at = row * 2 * inner + i
    gate = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + at + inner, mask=inside, other=0.0).to(tl.float32)
    grad_out = tl.load(grad + row * inner + i, mask=inside, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-gate))
    to_gate = grad_out * up * share * (1 + gate * (1 - share))
    dtype = to_hidden.dtype.element_ty
    tl.store(to_hidden + at, to_gate.to(dtype), mask=inside)
    tl.store(to_hidden + at + inner, (grad_out * gate * share).to(dtype), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        ctx.save_for_backward(hidden)
        inner = hidden.shape[-1] // 2
        out = hidden.new_empty(*hidden.shape[:-1], inner)
        grid = (hidden.numel() // (2 * inner), triton.cdiv(inner, BLOCK))
        _swiglu[grid](hidden, out, inner, BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        inner = hidden.shape[-1] // 2
        to_hidden = torch.empty_like(hidden)
        grid = (hidden.numel() // (2 * inner), triton.cdiv(inner, BLOCK))
        _swiglu_backward[grid](hidden, grad.contiguous(), to_hidden, inner, BLOCK=BLOCK)
        return to_hidden


def swiglu(hidden: Tensor) -> Tensor:
    """As `mlp.swiglu`."""
    return _SwiGLU.apply(hidden)


@triton.jit
def _rotate(
    x, cos, sin, out, sign, to_row, to_outer, to_inner, inner, heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Some heads of one position: the halves of a head are the pairs that are rotated."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)[None]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    inside = (head < heads) & (i < HALF)
    source = x + row * to_row + (head // inner) * to_outer + (head % inner) * to_inner + i
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = row * 2 * HALF + i
    c = tl.load(cos + angle, mask=i < HALF, other=0.0).to(tl.float32)
    s = sign * tl.load(sin + angle, mask=i < HALF, other=0.0).to(tl.float32)
    target = out + (row * heads + head) * 2 * HALF + i
    dtype = out.dtype.element_ty
    tl.store(target, (low * c - high * s).to(dtype), mask=inside)
    tl.store(target + HALF, (high * c + low * s).to(dtype), mask=inside)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    rows, width = len(x), x.shape[-1]
    heads = x.unsqueeze(1) if x.dim() == 3 else x
    if heads.dim() != 4 or heads.stride(-1) != 1:
        heads = x.reshape(rows, 1, -1, width)
    _, outer, inner, _ = heads.shape
    _rotate[(rows, triton.cdiv(outer * inner, HEADS))](
        heads, cos, sin, out, sign, *heads.stride()[:3], inner, outer * inner,
        HALF=width // 2, BLOCK=triton.next_power_of_2(width // 2), HEADS=HEADS, num_warps=1,
    )  # fmt: skip
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rope.rotate`."""
    return _Rotate.apply(x, cos, sin)


@triton.jit
def _statistics(logits, own, log_sum, picked, total, size, BLOCK: tl.constexpr):
    """One row: peak and sum of exponentials in one pass, each block scaled to the peak so far."""
    row = tl.program_id(0).to(tl.int64)
    peak, exponentials, plain = -float("inf"), 0.0, 0.0
    for begin in range(0, size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(logits + row * size + i, mask=i < size, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        exponentials = exponentials * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
        plain += tl.sum(tl.where(i < size, x, 0.0), 0)
        peak = higher
    column = tl.load(own + row)
    value = tl.load(logits + row * size + column, mask=column >= 0, other=0.0).to(tl.float32)
    tl.store(log_sum + row, peak + tl.log(exponentials))
    tl.store(picked + row, value)
    tl.store(total + row, plain)


@triton.jit
def _statistics_backward(
    logits, own, log_sum, to_log_sum, to_picked, to_total, size, BLOCK: tl.constexpr
):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, inside = logits + row * size + i, i < size
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.exp(x - tl.load(log_sum + row)) * tl.load(to_log_sum + row) + tl.load(to_total + row)
    grad += tl.where(i == tl.load(own + row), tl.load(to_picked + row), 0.0)
    tl.store(at, grad.to(logits.dtype.element_ty), mask=inside)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, own: Tensor):
        logits = logits.contiguous()
        rows, size = logits.shape
        out = logits.new_empty(3, rows, dtype=torch.float32).unbind()
        if rows:
            _statistics[(rows,)](logits, own, *out, size, BLOCK=LOGITS, num_warps=8)
        ctx.save_for_backward(logits, own, out[0])
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        logits, own, log_sum = ctx.saved_tensors
        rows, size = logits.shape
        contiguous = [grad.contiguous() for grad in grads]
        if rows:
            grid = (rows, triton.cdiv(size, LOGITS))
            _statistics_backward[grid](
                logits, own, log_sum, *contiguous, size, BLOCK=LOGITS, num_warps=8
            )
        return logits, None


def statistics(logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `Kernels.statistics`. The backward pass may run once, and overwrites the logits: nobody
    else may need them."""
    return _Statistics.apply(logits, own)
