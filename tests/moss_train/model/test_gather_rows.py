"""Moved rows against torch's own indexing, gradients included."""

from __future__ import annotations

import torch

from moss_train.model.gather_rows import RowMap, RowSubset


def expected_scatter(x: torch.Tensor, source: torch.Tensor, places: torch.Tensor, size: int):
    out = x.new_zeros(size, *x.shape[1:])
    out[places] = x[source]
    return out


def test_rows_move_to_their_places_and_back() -> None:
    source, places = torch.tensor([4, 0, 2]), torch.tensor([1, 5, 3])
    row_map = RowMap(source, places, (6, 7))
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        row_map.scatter(x), expected_scatter(x, source, places, 7), rtol=0, atol=0
    )
    torch.testing.assert_close(
        row_map.gather(y), expected_scatter(y, places, source, 6), rtol=0, atol=0
    )
    assert torch.autograd.gradcheck(row_map.scatter, x)
    assert torch.autograd.gradcheck(row_map.gather, y)


def test_some_rows_are_taken_and_put_back_among_zeros() -> None:
    index = torch.tensor([1, 3])
    x = torch.randn(5, 2)
    subset = RowSubset(index, 5)
    torch.testing.assert_close(subset.gather(x), x[index], rtol=0, atol=0)
    torch.testing.assert_close(
        subset.scatter(subset.gather(x)), x * torch.tensor([0, 1, 0, 1, 0])[:, None], rtol=0, atol=0
    )


def test_all_rows_are_left_where_they_are() -> None:
    x = torch.randn(3, 2)
    subset = RowSubset(torch.arange(3), 3)
    assert subset.gather(x) is x
    assert subset.scatter(x) is x
