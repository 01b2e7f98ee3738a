"""torch's attention, with folded heads and several forms of masks, against a softmax in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moss_train.model.padded_attention import HIDDEN, additive_mask
from moss_train.model.sdpa import SHORT, attend, attend_fused, spread

BATCH, KV_HEADS, WIDTH, COLUMNS = 2, 2, 8, 7


def reference(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """`hidden`: `[B, S, K]`."""
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    scores = torch.einsum("bshd,bkhd->bhsk", q, k) / WIDTH**0.5
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhsk,bkhd->bshd", weights, v)


def heads(count: int, length: int) -> Tensor:
    return torch.randn(BATCH, length, count, WIDTH, dtype=torch.float64)


def compare(core: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    gradient, results = torch.randn_like(inputs[0]), []
    for attended in (core, expected):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attended(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, gradient)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kernel", [attend, attend_fused])
@pytest.mark.parametrize("length", [5, SHORT + 2])
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("kind", ["none", "of each query", "of all alike", "causal"])
def test_heads_attend_as_by_the_formula(kernel, length, shared, kind):
    torch.manual_seed(length)
    each = 1 if kind == "causal" else 3  # keys of a mask's column
    columns = length if kind == "causal" else COLUMNS
    q, k, v = (
        heads(n, m) for n, m in ((KV_HEADS * shared, length), *[(KV_HEADS, columns * each)] * 2)
    )
    hidden = {
        "none": torch.zeros(BATCH, 1, columns),
        "of each query": torch.rand(BATCH, length, columns) > 0.6,
        "of all alike": torch.rand(BATCH, 1, columns) > 0.6,
        "causal": torch.ones(length, length).triu(1).expand(BATCH, -1, -1),
    }[kind].bool()
    hidden[:, :, :1] = False
    seen = hidden.expand(-1, length, -1).repeat_interleave(each, dim=2)
    mask = None if kind == "causal" else additive_mask(hidden)
    assert (mask is None) == (kind in ("none", "causal"))
    added = None if mask is None else spread(mask[:, None], shared, each, q.dtype)
    compare(
        lambda q, k, v: kernel(q, k, v, added, kind == "causal"),
        lambda q, k, v: reference(q, k, v, seen),
        q, k, v,
    )  # fmt: skip


def test_a_mask_is_one_row_where_all_queries_see_the_same():
    hidden = torch.tensor([[[False, True]] * 4, [[False, False]] * 4])
    mask = additive_mask(hidden)
    assert mask is not None
    assert torch.equal(mask, torch.tensor([[[0, HIDDEN]], [[0, 0]]]))
    hidden[1, 2, 1] = True
    each = additive_mask(hidden)
    assert each is not None
    assert each.shape == (2, 4, 2)
    assert additive_mask(torch.zeros(2, 4, 2, dtype=torch.bool)) is None
