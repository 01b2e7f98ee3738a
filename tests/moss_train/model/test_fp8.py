"""Layers in FP8: how far from fp64, what a frozen tower reads, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from data_pipeline.choose_fp8 import ROUNDING, triton_kernels
from data_pipeline.fp8 import Fp8
from moss_train import hardware
from moss_train.config import Config
from moss_train.model import choose_kernels
from moss_train.model.fp8 import linear_fp8
from moss_train.model.kernels import Kernels
from moss_train.model.weight_gradient import accumulate
from moss_train.validate import check_layout
from tests.data_pipeline.test_fp8 import OFF, drawn
from tests.moss_train.model.build import preset, random_model
from tests.moss_train.model.test_kernels import loss_and_gradients


@pytest.mark.parametrize("rows", [32, 19])
def test_a_layer_and_its_gradients_are_within_the_format_of_fp64(rows: int) -> None:
    """Each factor of a product is off by a share e of it at most, and so is the product by 2 e +
    e^2. Numbers near zero, below the smallest step, add little to it. The gradient of the weight is
    bf16's."""
    x, weight, bias = drawn(2, rows, 64), drawn(48, 64, seed=1), drawn(48, seed=2)
    grad = drawn(2, rows, 48, seed=3)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = linear_fp8(Fp8(), leaves[0], leaves[1], leaves[2])
    out.backward(grad)
    found: list[Any] = [out.detach(), *(t.grad for t in leaves)]
    exact: list[Any] = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = linear(*exact)
    expected.backward(grad.double())
    a, w, g = (t.double().abs() for t in (x, weight, grad))
    for number, size in ((0, a @ w.T), (1, g @ w)):
        right = expected.detach() if number == 0 else exact[0].grad
        bound = size * ((1 + OFF) ** 2 - 1 + 0.01) + right.abs() * 2**-8
        error = (found[number].double() - right).abs()
        assert (error <= bound).all(), number
        assert error.mean() > 2e-3 * size.mean()  # fewer bits than bf16 has
        assert found[number].dtype is torch.bfloat16
    of_rows = (g.flatten(0, 1).T @ a.flatten(0, 1)) * 2**-8
    assert ((found[2].double() - exact[1].grad).abs() <= of_rows).all()
    torch.testing.assert_close(found[3].double(), exact[2].grad, rtol=2**-7, atol=0.5)


def test_a_main_gradient_is_added_to_in_fp32() -> None:
    x, weight = (t.float() for t in (drawn(19, 64), drawn(48, 64, seed=1)))
    plain = weight.clone().requires_grad_()
    linear_fp8(Fp8(), x, plain).sum().backward()
    own = weight.clone().requires_grad_()
    own.main_grad = torch.ones(48, 64)  # type: ignore[attr-defined]
    linear_fp8(Fp8(), x, own, add=accumulate).sum().backward()
    assert own.grad_added_to_main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(own.main_grad - 1, plain.grad)  # type: ignore[attr-defined]


@pytest.mark.parametrize("part", ["tower", "all"])
def test_a_model_s_gradients_point_where_bf16_s_do(groups, part: str) -> None:
    tiny = preset("tiny", dtype="bf16")
    plain = loss_and_gradients(random_model(tiny, groups), torch.bfloat16)
    kernels = Kernels(fp8=Fp8())
    in_fp8 = random_model(replace(tiny, fp8=part), groups, kernels)
    found = loss_and_gradients(in_fp8, torch.bfloat16)
    assert found["loss"] != plain["loss"]
    assert found["loss"] == pytest.approx(float(plain["loss"]), rel=0.05)
    names = [name for name in plain if name != "loss"]
    ours, theirs = (torch.cat([g[n].float().flatten() for n in names]) for g in (found, plain))
    assert cosine_similarity(ours, theirs, dim=0) > 0.9  # of narrow layers
    # The head, embeddings and norms are no such layers; those of the part are.
    decoder: Any = in_fp8.chunks[0]
    tower: Any = in_fp8.encoder.vision
    assert decoder.output.config.kernels.fp8 is None
    assert (decoder.layers["0"].mlp.linear_fc1.config.kernels.fp8 is None) == (part == "tower")
    assert tower.local_layers[0].mlp.linear_fc1.config.kernels.fp8 == Fp8()


def test_it_is_off_unless_it_is_asked_for(groups) -> None:
    tiny = preset("tiny")
    assert choose_kernels.choose_kernels(tiny).fp8 is None
    assert choose_kernels.choose_kernels(replace(tiny, fp8="all")).fp8 == Fp8()


def frozen_tower(groups: Any, kernels: Kernels, dtype: torch.dtype) -> Tensor:
    """What it makes of two frames."""
    tiny = preset("tiny", dtype="fp32", fp8="tower")
    tower = random_model(tiny, groups, kernels).encoder.vision.to(dtype)
    pixels = torch.randn(2, 1, 3, 56, 56, generator=torch.Generator().manual_seed(0)).to(dtype)
    return tower(pixels, torch.ones(2, dtype=torch.long))[0].detach()


def test_a_tower_that_is_frozen_reads_what_norms_and_gelu_wrote_in_fp8(groups) -> None:
    """The same numbers as where gradients are wanted, by torch and by the kernels."""
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            calls.append(name)
            return function(*given)

        return call

    by = {name: counted(name, kernel) for name, kernel in triton_kernels().items()}
    wanted = frozen_tower(groups, Kernels(fp8=Fp8()), torch.float32)
    with torch.no_grad():
        plain = frozen_tower(groups, Kernels(fp8=Fp8()), torch.float32)
        found = frozen_tower(groups, Kernels(fp8=Fp8(**by)), torch.float32)
    assert torch.equal(plain, wanted)
    layers = preset("tiny").vision.num_layers + preset("tiny").vision.num_global_layers
    # Besides: the output of attention, and four weights.
    counts = {"norm": 2 * layers, "gelu": layers, "round": 5 * layers}
    assert {name: calls.count(name) for name in ROUNDING} == counts
    assert cosine_similarity(found.flatten(), plain.flatten(), dim=0) > 0.999
    exact = frozen_tower(groups, Kernels(), torch.float32)
    assert (found - exact).norm() < 1.2 * (plain - exact).norm()


def test_an_adapter_gets_its_input_as_it_is(groups) -> None:
    tower: Any = random_model(
        preset("tiny", fp8="tower"), groups, Kernels(fp8=Fp8())
    ).encoder.vision
    layer = tower.local_layers[0]
    with torch.no_grad():
        assert layer.mlp.linear_fc1.rounds == Fp8()
        layer.mlp.linear_fc1.adapt(2, 1.0)
        assert layer.mlp.linear_fc1.rounds is None
    assert layer.mlp.linear_fc2.rounds is None  # gradients are wanted


def test_wrong_use_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(model=preset("tiny", fp8="all", dtype="bf16"))
    config.hardware.device = "cpu"
    assert list(check_layout(config, 1)) == []
    config.model.vision.mlp_size = 72
    (line,) = check_layout(config, 1)
    assert line == "model.fp8=all: model.vision.mlp_size=72: must be a multiple of 16"
    config.model.vision.mlp_size = 64
    config.parallel.tensor = 2
    (line,) = check_layout(config, 2)
    assert "model.fp8=tower" in line
    config.model.fp8 = "tower"
    assert list(check_layout(config, 2)) == []
    config.parallel.vision_tensor = True
    (line,) = check_layout(config, 2)
    assert "parallel.vision_tensor=false" in line


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on such a GPU, whose part alone is made up."""
    config = Config(model=preset("tiny", fp8="tower", dtype="fp32"))
    monkeypatch.setattr(hardware, "refusal", lambda _: None)
    monkeypatch.setattr(hardware, "kind_of", lambda _: "cuda")
    monkeypatch.setattr(hardware, "device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(hardware, "has_fp8", lambda: False)
    config.model.attention = "sdpa"
    first, second = check_layout(config, 1)
    assert "NVIDIA A100-SXM4-80GB does not multiply in FP8" in first
    assert "model.fp8=none" in first
    assert "needs model.dtype=bf16" in second
