"""Products with weights in 8 bits: the weights are read as they are stored, and never written in
another form.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from inference.kernels import plain

ROWS = 128  # up to so many tokens the product is limited by reading the weights
OUT_OF_ONE = 4  # rows of the weight a program takes, for one token
OUT_OF_SEVERAL = 32


@triton.jit
def _one_token(x, weight, scale, out, K, outs, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """out[o] = scale[o] x sum over k of weight[o, k] x[k]."""
    o, i = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, BLOCK)
    real = o < outs
    line = weight + o.to(tl.int64)[:, None] * K
    sums = tl.zeros([OUT, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        inside = k + i < K
        values = tl.load(x + k + i, mask=inside, other=0.0).to(tl.float32)
        mask = real[:, None] & inside[None, :]
        sums += tl.load(line + (k + i)[None, :], mask=mask, other=0.0).to(tl.float32) * values[None]
    whole = tl.sum(sums, 1) * tl.load(scale + o, mask=real, other=0.0).to(tl.float32)
    tl.store(out + o, whole.to(out.dtype.element_ty), mask=real)


@triton.jit
def _several_tokens(
    x, weight, scale, out, N, K, outs,
    TOKENS: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for a tile of tokens, in the processors' matrix units."""
    n = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    o, i = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, BLOCK)
    line = weight + o.to(tl.int64)[:, None] * K
    sums = tl.zeros([TOKENS, OUT], tl.float32)
    for k in range(0, K, BLOCK):
        inside = k + i < K
        mask = (n < N)[:, None] & inside[None, :]
        values = tl.load(x + n[:, None] * K + (k + i)[None, :], mask=mask, other=0.0)
        mask = (o < outs)[:, None] & inside[None, :]
        weights = tl.load(line + (k + i)[None, :], mask=mask, other=0.0).to(values.dtype)
        sums += tl.dot(values, tl.trans(weights), input_precision="ieee")
    sums = sums * tl.load(scale + o, mask=o < outs, other=0.0).to(tl.float32)[None, :]
    place = out + n[:, None] * outs + o[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(n < N)[:, None] & (o < outs)[None, :])


def product8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As `plain.product8`; for many tokens it is that, where the product itself takes the time."""
    (count, width), outs = x.shape, len(weight)
    if count > ROWS:
        return plain.product8(x, weight, scale)
    out = x.new_empty(count, outs)
    if count == 1:
        block = min(1024, triton.next_power_of_2(width))
        _one_token[(triton.cdiv(outs, OUT_OF_ONE),)](
            x, weight, scale, out, width, outs, OUT=OUT_OF_ONE, BLOCK=block, num_warps=4
        )
        return out
    tokens = min(64, max(16, triton.next_power_of_2(count)))
    grid = (triton.cdiv(outs, OUT_OF_SEVERAL), triton.cdiv(count, tokens))
    _several_tokens[grid](
        x, weight, scale, out, count, width, outs, TOKENS=tokens, OUT=OUT_OF_SEVERAL, BLOCK=128,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
