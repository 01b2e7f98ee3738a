"""Products with weights in 8 or 4 bits: the weights are read as they are stored, and never written
in another form.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from inference.kernels.plain import GROUP

OUT_OF_ONE = 4  # rows of the weight a program takes, for one token
GROUPS_AT_ONCE = 16  # of weights in 4 bits
FEW = 64  # up to so many tokens the product is limited by reading the weights


@dataclass(frozen=True)
class Tile:
    """What a program computes of the output for several tokens: of few tokens few rows of the
    weight, so that there are enough programs to read it; of many as much as one can hold, so that
    what is read is used often."""

    tokens: int
    outs: int
    block: int  # inputs at a time
    warps: int
    stages: int

    @classmethod
    def of(cls, count: int) -> Tile:
        """The tile for a product of so many tokens."""
        if count > FEW:
            return cls(tokens=128, outs=128, block=64, warps=8, stages=3)
        tokens = max(16, triton.next_power_of_2(count))
        return cls(tokens, outs=32, block=128, warps=4, stages=4)

    def grid(self, count: int, outs: int) -> tuple[int, int]:
        """Programs beside one another share rows of the weight, which are then read once."""
        return triton.cdiv(count, self.tokens), triton.cdiv(outs, self.outs)


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
    """As `_one_token` for a tile of tokens, in the processors' matrix units."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    o, i = tl.program_id(1) * OUT + tl.arange(0, OUT), tl.arange(0, BLOCK)
    line, tokens = weight + o.to(tl.int64)[:, None] * K, x + n.to(tl.int64)[:, None] * K
    sums = tl.zeros([TOKENS, OUT], tl.float32)
    for k in range(0, K, BLOCK):
        inside = k + i < K
        mask = (n < N)[:, None] & inside[None, :]
        values = tl.load(tokens + (k + i)[None, :], mask=mask, other=0.0)
        mask = (o < outs)[:, None] & inside[None, :]
        weights = tl.load(line + (k + i)[None, :], mask=mask, other=0.0).to(values.dtype)
        sums += tl.dot(values, tl.trans(weights), input_precision="ieee")
    sums = sums * tl.load(scale + o, mask=o < outs, other=0.0).to(tl.float32)[None, :]
    place = out + n.to(tl.int64)[:, None] * outs + o[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(n < N)[:, None] & (o < outs)[None, :])


def product8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As `plain.product8`."""
    (count, width), outs = x.shape, len(weight)
    out = x.new_empty(count, outs)
    if count == 1:
        block = min(1024, triton.next_power_of_2(width))
        _one_token[(triton.cdiv(outs, OUT_OF_ONE),)](
            x, weight, scale, out, width, outs, OUT=OUT_OF_ONE, BLOCK=block, num_warps=4
        )
        return out
    tile = Tile.of(count)
    _several_tokens[tile.grid(count, outs)](
        x, weight, scale, out, count, width, outs, TOKENS=tile.tokens, OUT=tile.outs,
        BLOCK=tile.block, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def _one_token_4(
    x, weight, scale, out, K, groups, outs,
    OUT: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out[o] = sum over groups g of scale[o, g] x sum over k in g of number[o, k] x[k].

    A byte of a group has the numbers k and k + HALF.
    """
    o, i = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, GROUPS)
    j = tl.arange(0, HALF)[None, None, :]
    line = o.to(tl.int64)[:, None] * groups
    sums = tl.zeros([OUT, GROUPS], tl.float32)
    for start in range(0, groups, GROUPS):
        g = start + i
        mask = (o < outs)[:, None] & (g < groups)[None, :]
        first = g[None, :, None] * (2 * HALF) + j
        low = tl.load(x + first, mask=first < K, other=0.0).to(tl.float32)
        high = tl.load(x + first + HALF, mask=first + HALF < K, other=0.0).to(tl.float32)
        place = line + g[None, :]  # of a row's group
        pairs = tl.load(weight + place[:, :, None] * HALF + j, mask=mask[:, :, None], other=0)
        products = ((pairs & 15).to(tl.float32) - 8) * low
        products += ((pairs >> 4).to(tl.float32) - 8) * high
        scales = tl.load(scale + place, mask=mask, other=0.0).to(tl.float32)
        sums += tl.sum(products, 2) * scales
    tl.store(out + o, tl.sum(sums, 1).to(out.dtype.element_ty), mask=o < outs)


@triton.jit
def _several_tokens_4(
    x, weight, scale, out, N, K, groups, outs,
    TOKENS: tl.constexpr, OUT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The same for a tile of tokens, in the processors' matrix units, a group at a time."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    o, j = tl.program_id(1) * OUT + tl.arange(0, OUT), tl.arange(0, HALF)
    line, tokens = o.to(tl.int64)[:, None] * groups, x + n.to(tl.int64)[:, None] * K
    real, there = (o < outs)[:, None], (n < N)[:, None]
    sums = tl.zeros([TOKENS, OUT], tl.float32)
    for g in range(0, groups):
        k = (g * (2 * HALF) + j)[None, :]
        low = tl.load(tokens + k, mask=there & (k < K), other=0.0)
        high = tl.load(tokens + k + HALF, mask=there & (k + HALF < K), other=0.0)
        pairs = tl.load(weight + (line + g) * HALF + j[None, :], mask=real, other=0)
        first = ((pairs & 15).to(tl.int8) - 8).to(low.dtype)  # exact in every dtype
        second = ((pairs >> 4).to(tl.int8) - 8).to(low.dtype)
        part = tl.dot(low, tl.trans(first), input_precision="ieee")
        part = tl.dot(high, tl.trans(second), part, input_precision="ieee")
        scales = tl.load(scale + o * groups + g, mask=o < outs, other=0.0).to(tl.float32)
        sums += part * scales[None, :]
    place = out + n.to(tl.int64)[:, None] * outs + o[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=there & (o < outs)[None, :])


def product4(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As `plain.product4`."""
    (count, width), (outs, groups) = x.shape, scale.shape
    out = x.new_empty(count, outs)
    if count == 1:
        at_once = min(GROUPS_AT_ONCE, triton.next_power_of_2(groups))
        _one_token_4[(triton.cdiv(outs, OUT_OF_ONE),)](
            x, weight, scale, out, width, groups, outs, OUT=OUT_OF_ONE, GROUPS=at_once,
            HALF=GROUP // 2, num_warps=4,
        )  # fmt: skip
        return out
    tile = Tile.of(count)
    _several_tokens_4[tile.grid(count, outs)](
        x, weight, scale, out, count, width, groups, outs, TOKENS=tile.tokens, OUT=tile.outs,
        HALF=GROUP // 2, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
