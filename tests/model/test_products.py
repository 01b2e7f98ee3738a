"""Products of linear layers against fp64, by whichever library this processor gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moss_train.model import products


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=[False, True], ids=["blas", "onednn"])
def library(request, monkeypatch):
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 1), (3, 9), (2, 3, 4)])
def test_a_product_and_its_gradients_are_those_in_fp64(library, shape, biased):
    torch.manual_seed(0)
    inputs = [_random(*shape, 33), _random(17, 33), _random(17) if biased else None]
    grad = _random(*shape, 17)

    def run(dtype: torch.dtype) -> list[Tensor]:
        given = [None if t is None else t.to(dtype).requires_grad_() for t in inputs]
        out = products.linear(*given)
        out.backward(grad.to(dtype))
        return [out, *(t.grad for t in given if t is not None)]

    for found, exact in zip(run(torch.float32), run(torch.float64), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_inputs_of_any_strides(library):
    torch.manual_seed(1)
    x = torch.randn(6, 4, 10).transpose(0, 1)[..., ::2].requires_grad_()
    weight = torch.randn(5, 8).T.requires_grad_()
    out = products.linear(x, weight)
    grad = torch.randn(8, 4, 6).permute(1, 2, 0)
    got = torch.autograd.grad(out, (x, weight), grad)
    wanted = torch.autograd.grad(x @ weight.T, (x, weight), grad)
    torch.testing.assert_close(out, x @ weight.T)
    torch.testing.assert_close(got, wanted)


def test_frozen_weights_get_no_gradient(library):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    products.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))
    assert weight.grad is None


def test_nothing_times_a_weight_is_nothing(library):
    x, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    out = products.linear(x, weight)
    out.sum().backward()
    assert out.shape == (0, 5)
    torch.testing.assert_close(weight.grad, torch.zeros(5, 4))
