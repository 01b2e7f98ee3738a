"""Rows of a tensor taken out and put back, with cheap and deterministic gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """Some of N rows: `take` picks them, `put` returns them to their places among zeros."""

    def __init__(self, index: Tensor, total: int):
        """`index`: the rows `[n]`, each at most once."""
        self.index, self.all = index, len(index) == total
        if not self.all:  # where each row comes from; n, a row of zeros, for the others
            self.inverse = torch.full((total,), len(index), device=index.device)
            self.inverse[index] = torch.arange(len(index), device=index.device)

    def take(self, x: Tensor) -> Tensor:
        """`[N, ...]` -> `[n, ...]`."""
        return x if self.all else _Move.apply(x, self.index, self.inverse)

    def put(self, x: Tensor) -> Tensor:
        """`[n, ...]` -> `[N, ...]`."""
        return x if self.all else _Move.apply(x, self.inverse, self.index)


class _Move(torch.autograd.Function):
    """`x[index]`, a row of zeros where the index is len(x); `inverse` undoes it.

    Autograd's own indexing adds up gradients, which is slow and on a GPU not deterministic.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return _select(x, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return _select(grad, inverse), None, None


def _select(x: Tensor, index: Tensor) -> Tensor:
    if len(index) > len(x):
        x = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return x.index_select(0, index)
