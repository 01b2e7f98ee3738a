"""FP8 products: how far from fp64, what a GPU is asked, and what is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cosine_similarity, gelu, layer_norm, linear

from data_pipeline.kernel_proof import difference
from moss_train import hardware
from moss_train.config import Config
from moss_train.model import choose_kernels, fp8
from moss_train.model.choose_kernels import ROUNDING, Trials
from moss_train.model.fp8 import (
    FORMAT,
    Fp8,
    Rounded,
    emulated,
    gelu_rows,
    norm_rows,
    round_rows,
)
from moss_train.model.kernels import Kernels
from moss_train.model.weight_gradient import accumulate
from moss_train.validate import check_layout
from tests.moss_train.model.build import preset, random_model
from tests.moss_train.model.test_kernels import loss_and_gradients

triton_fp8 = pytest.importorskip("moss_train.model.triton_fp8")

# Of the published format: bits behind the point, the largest number, the smallest step.
BITS, LARGEST, STEP = 3, 448.0, 2.0**-9
OFF = 2.0 ** -(BITS + 1)  # a number is off by this share of it at most


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    return x.to(dtype)


def check_rounded(found: Rounded, exact: Tensor, beside: float = 0.0) -> None:
    """Against numbers in fp64. beside: the share of a number by which it was off before."""
    assert found.values.dtype is FORMAT
    assert found.values.shape == exact.shape
    assert found.scale.shape == (*exact.shape[:-1], 1)
    most = found.values.float().abs().amax(-1)
    assert ((most > LARGEST / 2 * (1 - OFF)) & (most <= LARGEST)).all()  # all of the range is used
    scale = found.scale.double()
    allowed = (exact.abs() * (OFF + beside)).clamp(min=STEP / 2 * scale) + 1e-12 * scale
    error = (found.values.double() * scale - exact).abs()
    assert (error <= allowed).all()
    assert error.sum() > exact.abs().sum() * OFF / 8  # rounded to no more bits


@pytest.mark.parametrize("size", [1e-12, 1.0, 3e20])
def test_a_number_is_off_by_half_a_step_at_most(size: float) -> None:
    x = drawn(64, 33) * size * torch.logspace(-2, 2, 64)[:, None].bfloat16()
    check_rounded(round_rows(x), x.double())


def test_nothing_stays_nothing_and_what_is_not_finite_is_seen() -> None:
    assert not round_rows(torch.zeros(4, 16)).values.float().any()
    for wrong in (torch.inf, torch.nan):
        numbers = round_rows(torch.tensor([[1.0, wrong], [2.0, 1.0]])).number()
        assert not torch.isfinite(numbers[0]).all()
        assert torch.equal(numbers[1], torch.tensor([2.0, 1.0]))


# No width is a power of two.
PLAIN: dict[str, tuple[Any, Any, list[tuple[int, ...]]]] = {
    "round": (round_rows, lambda x: x, [(3, 7, 48)]),
    "norm": (
        partial(norm_rows, eps=1e-5),
        lambda x, w, b: layer_norm(x, w.shape, w, b, 1e-5),
        [(3, 7, 80), (80,), (80,)],
    ),
    "gelu": (gelu_rows, gelu, [(3, 7, 1100)]),
}
TRITON = {name: getattr(triton_fp8, f"{name}_rows") for name in PLAIN}
TRITON["norm"] = partial(TRITON["norm"], eps=1e-5)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("by", ["torch", "triton"])
def test_what_writes_fp8_is_within_half_a_step_of_fp64(name: str, by: str) -> None:
    plain, exact, shapes = PLAIN[name]
    inputs = [drawn(*shape, dtype=torch.float32, seed=n) for n, shape in enumerate(shapes)]
    found = (plain if by == "torch" else TRITON[name])(*inputs)
    check_rounded(found, exact(*(x.double() for x in inputs)), 1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("size", [1e-12, 1.0, 3e20])
def test_the_kernel_rounds_as_torch_does_to_the_bit(size: float) -> None:
    """Ties, carries, steps below the smallest normal number, rows of zeros."""
    x = drawn(64, 96, dtype=torch.float16).float() * size
    x[0], x[1] = 0, size * torch.arange(96) / 64  # ties
    x[2, 1:] = size * torch.arange(95) * 2.0**-18
    ours, torchs = triton_fp8.round_rows(x), round_rows(x)
    assert torch.equal(ours.scale, torchs.scale)
    assert torch.equal(ours.values.view(torch.uint8), torchs.values.view(torch.uint8))
    assert triton_fp8.round_rows(x[:0]).values.shape == (0, 96)
    assert not torch.isfinite(triton_fp8.round_rows(x / 0).number()[1:]).any()


@pytest.mark.parametrize("rows", [32, 19])
def test_a_layer_and_its_gradients_are_within_the_format_of_fp64(rows: int) -> None:
    """Each factor of a product is off by a share e of it at most, and so is the product by 2 e +
    e^2. Numbers near zero, below the smallest step, add little to it. The gradient of the weight is
    bf16's."""
    x, weight, bias = drawn(2, rows, 64), drawn(48, 64, seed=1), drawn(48, seed=2)
    grad = drawn(2, rows, 48, seed=3)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = Fp8().linear(*leaves)
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
    Fp8().linear(x, plain).sum().backward()
    own = weight.clone().requires_grad_()
    own.main_grad = torch.ones(48, 64)  # type: ignore[attr-defined]
    Fp8().linear(x, own, add=accumulate).sum().backward()
    assert own.grad_added_to_main_grad  # type: ignore[attr-defined]
    torch.testing.assert_close(own.main_grad - 1, plain.grad)  # type: ignore[attr-defined]


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
        left = Rounded(a, options["scale_a"], out.dtype)
        right = Rounded(b.T, options["scale_b"].T, out.dtype)
        found = emulated(left, right, options["bias"], use_fast_accum)
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
        out = Fp8().linear(*own)
        out.backward(drawn(19, 48, seed=3))
        results.append([out.detach(), *(t.grad for t in own)])
    assert seen == [(FORMAT, FORMAT, torch.bfloat16, fast) for fast in (True, False)]
    for cpu, gpu in zip(*results, strict=True):
        assert torch.equal(cpu, gpu)


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


def test_the_proof_on_a_gpu_sees_wrong_scales() -> None:
    tiny = preset("tiny")
    trials = Trials(tiny.text, tiny.vision, torch.float16, torch.device("cpu"))
    assert [difference(case) for case in trials.fp8(Fp8())] == ["", ""]
    twice = Fp8(product=lambda left, right, *rest: 1.1 * emulated(left, right, *rest))
    assert all(difference(case) for case in trials.fp8(twice))
    for name in ROUNDING:
        kernel = getattr(triton_fp8, f"{name}_rows")
        cases = list(getattr(trials, name)(kernel))
        assert [difference(case) for case in cases] == [""] * len(cases)
        wrong = getattr(trials, name)(lambda *given, by=kernel, **more: halved(by(*given, **more)))
        assert all(difference(case) for case in wrong)


def halved(x: Rounded) -> Rounded:
    return replace(x, scale=x.scale * (1 - 0.5 * (torch.arange(len(x.scale)) == 1)[:, None]))


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

    by = {name: counted(name, getattr(triton_fp8, f"{name}_rows")) for name in ROUNDING}
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
