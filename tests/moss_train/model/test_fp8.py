"""FP8 products: how far from fp64, what a GPU is asked, and what is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cosine_similarity, linear

from data_pipeline.kernel_proof import difference
from moss_train import hardware
from moss_train.config import Config
from moss_train.model import choose_kernels, fp8
from moss_train.model.choose_kernels import Trials
from moss_train.model.fp8 import GRADIENTS, VALUES, linear_fp8, quantize
from moss_train.model.kernels import Kernels
from moss_train.validate import check_layout
from tests.moss_train.model.build import preset, random_model
from tests.moss_train.model.test_kernels import loss_and_gradients

# Of the published formats: bits behind the point, the largest number, the smallest step.
FORMATS = {VALUES: (3, 448.0, 2.0**-9), GRADIENTS: (2, 57344.0, 2.0**-16)}


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    return x.to(dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [1e-12, 1.0, 3e20])
def test_a_number_is_off_by_half_a_step_at_most(dtype: torch.dtype, size: float) -> None:
    bits, largest, step = FORMATS[dtype]
    x = drawn(64, 32) * size
    values, scale = quantize(x, dtype)
    assert values.dtype is dtype
    assert largest / 2 < values.float().abs().max() <= largest  # all of the range is used
    exact, found = x.double(), values.double() * scale.double()
    allowed = (exact.abs() * 2.0 ** -(bits + 1)).clamp(min=step / 2 * scale.double())
    assert ((found - exact).abs() <= allowed).all()


def test_nothing_stays_nothing_and_what_is_not_finite_is_seen() -> None:
    assert not quantize(torch.zeros(4, 16), VALUES)[0].float().any()
    for wrong in (torch.inf, torch.nan):
        values, scale = quantize(torch.tensor([1.0, wrong]), VALUES)
        assert not torch.isfinite(values.float() * scale).all()


@pytest.mark.parametrize("rows", [32, 19])
def test_a_layer_and_its_gradients_are_within_the_formats_of_fp64(rows: int) -> None:
    """Each factor of a product is off by a share e of it at most, and so is the product by the sum
    of both and their product. Numbers near zero, below the smallest step, add little to it."""
    x, weight, bias = drawn(2, rows, 64), drawn(48, 64, seed=1), drawn(48, seed=2)
    grad = drawn(2, rows, 48, seed=3)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = linear_fp8(*leaves)
    out.backward(grad)
    found: list[Any] = [out.detach(), *(t.grad for t in leaves)]
    exact: list[Any] = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = linear(*exact)
    expected.backward(grad.double())
    a, w, g = (t.double().abs() for t in (x.flatten(0, 1), weight, grad.flatten(0, 1)))
    of_values, of_gradients = 2.0**-4, 2.0**-3
    sizes = [(a @ w.T).view(2, rows, -1), (g @ w).view(2, rows, -1), g.T @ a]
    for number, size, e in zip(
        (0, 1, 2), sizes, (of_values, of_gradients, of_gradients), strict=True
    ):
        right = expected.detach() if number == 0 else exact[number - 1].grad
        bound = size * ((1 + e) * (1 + of_values) - 1 + 0.01) + right.abs() * 2**-8
        error = (found[number].double() - right).abs()
        assert (error <= bound).all(), number
        assert error.mean() > 2e-3 * size.mean()  # fewer bits than bf16 has
        assert found[number].dtype is torch.bfloat16
    torch.testing.assert_close(found[3].double(), exact[2].grad, rtol=2**-7, atol=0.5)


def test_a_main_gradient_is_added_to_in_fp32() -> None:
    x, weight = drawn(19, 64), drawn(48, 64, seed=1)
    plain = weight.clone().requires_grad_()
    linear_fp8(x, plain).sum().backward()
    own = weight.clone().requires_grad_()
    own.main_grad = torch.ones(48, 64)  # type: ignore[attr-defined]
    linear_fp8(x, own).sum().backward()
    assert own.grad_added_to_main_grad  # type: ignore[attr-defined]
    added = own.main_grad - 1  # type: ignore[attr-defined]
    torch.testing.assert_close(added.bfloat16(), plain.grad, rtol=2**-7, atol=2**-7)


def test_a_gpu_gets_products_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts, sizes and types are checked by torch itself, with tensors that claim to be a GPU's.
    The numbers are those of a CPU."""
    seen: list[tuple] = []

    def product(a: Tensor, b: Tensor, *, use_fast_accum: bool, **options: Any) -> Tensor:
        def twin(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

        with FakeTensorMode():
            out = real(twin(a), twin(b), **{key: twin(x) for key, x in options.items()})
        seen.append((a.dtype, b.dtype, out.dtype, use_fast_accum))
        scales = options["scale_a"], options["scale_b"]
        found = fp8.emulated((a, scales[0]), (b, scales[1]), out.dtype, options["bias"])
        assert (found.shape, found.dtype) == (out.shape, out.dtype)
        return found

    leaves = [drawn(19, 64), drawn(48, 64, seed=1), drawn(48, seed=2)]
    results = []
    real = torch._scaled_mm
    for on_gpu in (False, True):
        if on_gpu:
            monkeypatch.setattr(fp8, "is_accelerator", lambda _: True)
            monkeypatch.setattr(torch, "_scaled_mm", product)
        own = [t.clone().requires_grad_() for t in leaves]
        out = linear_fp8(*own)
        out.backward(drawn(19, 48, seed=3))
        results.append([out.detach(), *(t.grad for t in own)])
    assert seen == [
        (VALUES, VALUES, torch.bfloat16, True),
        (GRADIENTS, VALUES, torch.bfloat16, False),
        (GRADIENTS, VALUES, torch.float32, False),
    ]
    for cpu, gpu in zip(*results, strict=True):
        assert torch.equal(cpu, gpu)


@pytest.mark.parametrize("part", ["tower", "all"])
def test_a_model_s_gradients_point_where_bf16_s_do(groups, part: str) -> None:
    tiny = preset("tiny", dtype="bf16")
    plain = loss_and_gradients(random_model(tiny, groups), torch.bfloat16)
    kernels = Kernels(fp8=linear_fp8)
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
    assert tower.local_layers[0].mlp.linear_fc1.config.kernels.fp8 is linear_fp8


def test_it_is_off_unless_it_is_asked_for(groups) -> None:
    tiny = preset("tiny")
    assert choose_kernels.choose_kernels(tiny).fp8 is None
    assert choose_kernels.choose_kernels(replace(tiny, fp8="all")).fp8 is linear_fp8


def test_the_proof_on_a_gpu_sees_wrong_scales() -> None:
    trials = Trials(preset("tiny").text, torch.bfloat16, torch.device("cpu"))
    assert [difference(case) for case in trials.fp8(linear_fp8)] == ["", ""]
    wrong = [difference(case) for case in trials.fp8(lambda *given: 1.1 * linear_fp8(*given))]
    assert all(wrong)


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
