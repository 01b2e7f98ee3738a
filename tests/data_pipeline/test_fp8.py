"""FP8: how far rounded numbers are from fp64, the kernels that write them, products, the proof."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import gelu, layer_norm

from data_pipeline import choose_fp8, fp8
from data_pipeline.choose_fp8 import PRODUCT, Trials, fp8_of, right_parts, triton_kernels
from data_pipeline.fp8 import (
    FORMAT,
    Fp8,
    Rounded,
    emulated,
    gelu_rows,
    multiply,
    norm_rows,
    round_rows,
)
from data_pipeline.kernel_proof import difference

triton_fp8 = pytest.importorskip("data_pipeline.triton_fp8")

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
TRITON = triton_kernels()
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
        first = Rounded(a, options["scale_a"], out.dtype)
        second = Rounded(b.T, options["scale_b"].T, out.dtype)
        found = emulated(first, second, options["bias"], use_fast_accum)
        assert (found.shape, found.dtype) == (out.shape, out.dtype)
        return found

    real = torch._scaled_mm
    left, right = round_rows(drawn(2, 19, 64)), round_rows(drawn(48, 64, seed=1))
    for bias, fast in ((drawn(48, seed=2), True), (None, False)):
        monkeypatch.undo()
        wanted = multiply(left, right, bias, fast)
        assert wanted.shape == (2, 19, 48)
        monkeypatch.setattr(fp8, "is_accelerator", lambda _: True)
        monkeypatch.setattr(torch, "_scaled_mm", product)
        assert torch.equal(multiply(left, right, bias, fast), wanted)
    assert seen == [(FORMAT, FORMAT, torch.bfloat16, fast) for fast in (True, False)]


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_torch_s_own(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    """A CPU has one, too, with a scale for each row of both."""
    left, right = round_rows(drawn(2, 19, 64)), round_rows(drawn(48, 64, seed=1))
    offset = drawn(48, seed=2) if bias else None
    wanted = left.number().double() @ right.number().double().T
    wanted = wanted if offset is None else wanted + offset.double()
    for on_gpu in (False, True):
        monkeypatch.setattr(fp8, "is_accelerator", lambda _, made=on_gpu: made)
        found = multiply(left, right, offset, True)
        torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2**-7)


def test_the_proof_on_a_gpu_sees_what_is_wrong() -> None:
    trials = Trials([64, 80], torch.float16, torch.device("cpu"))
    assert [difference(case) for case in trials.product(Fp8())] == [""] * 4
    tenth = Fp8(product=lambda left, right, *rest: 1.1 * emulated(left, right, *rest))
    assert all(difference(case) for case in trials.product(tenth))
    for name, kernel in triton_kernels().items():
        cases = list(getattr(trials, name)(kernel))
        assert [difference(case) for case in cases] == ["", ""]
        wrong = getattr(trials, name)(lambda *given, by=kernel, **more: halved(by(*given, **more)))
        assert all(difference(case) for case in wrong)


def halved(x: Rounded) -> Rounded:
    """Its second row."""
    return replace(x, scale=x.scale * (1 - 0.5 * (torch.arange(len(x.scale)) == 1)[:, None]))


def test_only_what_is_right_is_used(tmp_path: Path, monkeypatch, caplog) -> None:
    """As on a GPU, whose part alone is made up: that Triton's kernels may run there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choose_fp8.devices, "has_triton", lambda _: True)
    monkeypatch.setattr(triton_fp8, "gelu_rows", lambda x: halved(triton_fp8.round_rows(x)))
    for _ in range(2):  # the second time by the verdicts that were kept
        right = right_parts([64, 80], torch.float32, torch.device("cpu"))
        assert right == ["round", "norm", PRODUCT]
    (first, second) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert first == second
    assert first.startswith("FP8 (gelu) is not used on CPU: 64 columns: the output differs")
    made = fp8_of(right)
    assert (made.round, made.gelu) == (triton_fp8.round_rows, gelu_rows)
    assert right_parts([64], torch.float32, torch.device("cpu"), triton=False) == [PRODUCT]
    assert fp8_of([PRODUCT]) == Fp8()
