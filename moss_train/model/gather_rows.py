"""Gathers rows of a tensor and scatters them back, with cheap and deterministic gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class RowMap:
    """Row `source[i]` of n belongs at place `places[i]` of m; each occurs once at most."""

    on_device = ("source", "places")

    def __init__(self, source: Tensor, places: Tensor, sizes: tuple[int, int]):
        """`source`, `places`: `[k]`; `sizes`: n, m."""
        n, m = sizes
        # Where each row comes from; one beyond the last, a row of zeros, for the others.
        self.source = torch.full((m,), n, device=source.device)
        self.source[places] = source
        self.places = torch.full((n,), m, device=source.device)
        self.places[source] = places
        self.fills, self.empties = len(places) == m, len(source) == n  # no zeros there, back

    def scatter(self, x: Tensor) -> Tensor:
        """`[n, ...]` -> `[m, ...]`, zeros where no row belongs."""
        return _SelectRows.apply(x, (self.source, self.fills), (self.places, self.empties))

    def gather(self, x: Tensor) -> Tensor:
        """`[m, ...]` -> `[n, ...]`, zeros for rows that belong nowhere."""
        return _SelectRows.apply(x, (self.places, self.empties), (self.source, self.fills))


class RowSubset(RowMap):
    """Some of N rows: `gather` picks them, `scatter` returns them to their places among zeros."""

    def __init__(self, index: Tensor, total: int):
        """`index`: the rows `[n]`, each at most once."""
        self.all = len(index) == total
        if not self.all:
            rows = torch.arange(len(index), device=index.device)
            super().__init__(rows, index, (len(index), total))

    def gather(self, x: Tensor) -> Tensor:
        """`[N, ...]` -> `[n, ...]`."""
        return x if self.all else super().gather(x)

    def scatter(self, x: Tensor) -> Tensor:
        """`[n, ...]` -> `[N, ...]`."""
        return x if self.all else super().scatter(x)


Index = tuple[Tensor, bool]  # rows to pick; False: len(x) among them stands for a row of zeros


class _SelectRows(torch.autograd.Function):
    """Picks rows of x; `inverse` undoes it.

    Autograd's own indexing adds up gradients, which is slow and on a GPU not deterministic.
    """

    @staticmethod
    def forward(ctx, x: Tensor, index: Index, inverse: Index) -> Tensor:
        ctx.inverse = inverse
        return _select(x, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _select(grad, ctx.inverse), None, None


def _select(x: Tensor, index: Index) -> Tensor:
    rows, all_real = index
    if not all_real:
        x = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return x.index_select(0, rows)
