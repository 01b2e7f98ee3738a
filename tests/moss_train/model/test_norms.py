"""RMSNorm against torch's, and its gradient against finite differences."""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm

from moss_train.model.norms import _RMSNorm


def test_the_norm_and_its_gradients_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    got, expected = _RMSNorm.apply(x, weight, 1e-5), rms_norm(x, (8,), weight, 1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(x)
    for mine, theirs in zip(
        torch.autograd.grad(got, (x, weight), gradient),
        torch.autograd.grad(expected, (x, weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(lambda *a: _RMSNorm.apply(*a, 1e-5), (x, weight))


def test_a_frozen_weight_gets_no_gradient() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.ones(8)
    _RMSNorm.apply(x, weight, 1e-5).sum().backward()
    assert weight.grad is None
    assert x.grad is not None
