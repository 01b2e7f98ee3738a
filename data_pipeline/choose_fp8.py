"""Chooses how products in FP8 are computed on a GPU: by the kernels that prove right there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_pipeline import devices
from data_pipeline.fp8 import Fp8, Rounded, emulated, gelu_rows, norm_rows, round_rows
from data_pipeline.kernel_proof import Case, Kernel, proven

log = logging.getLogger("moss_train.kernels")
ROUNDING = ("round", "norm", "gelu")  # parts of Fp8
PRODUCT = "product"
EPS = 1e-5  # of the norms that are compared


def right_parts(
    widths: Sequence[int], dtype: torch.dtype, device: torch.device, triton: bool = True
) -> list[str]:
    """Names of the Triton kernels that compute what plain torch does on a device, and PRODUCT if
    the device's product does. Logs a line for each.

    widths: of the rows that are rounded. triton: False: no kernels.
    """
    trials, right = Trials(widths, dtype, device), list[str]()
    kernels = triton_kernels() if triton and devices.has_triton(device) else {}

    def add(name: str, code: str, cases: Callable[[], Iterator[Case]]) -> None:
        modules = (__name__, round_rows.__module__, code)
        shapes = f"{dtype}, {[*widths]}"
        kernel = Kernel(f"FP8 ({name})", shapes, ("torch", "triton"), modules, cases)
        if proven(kernel, device):
            right.append(name)

    for name, kernel in kernels.items():
        add(name, kernel.__module__, partial(getattr(trials, name), kernel))
    made = fp8_of(right)
    add(PRODUCT, made.round.__module__, partial(trials.product, made))
    return right


def fp8_of(right: Sequence[str]) -> Fp8:
    """Made of those Triton kernels, and of plain torch for the rest."""
    names = [name for name in right if name in ROUNDING]
    kernels = triton_kernels() if names else {}
    return Fp8(**{name: kernels[name] for name in names})


def triton_kernels() -> dict[str, Any]:
    """Triton's kernels by the name of the part that they compute; {} where Triton is not installed,
    and a line says so."""
    try:
        from data_pipeline import triton_fp8
    except ImportError as error:
        log.warning("Triton's kernels for FP8 are not used: %s: pip install triton", error)
        return {}
    return {name: getattr(triton_fp8, f"{name}_rows") for name in ROUNDING}


class Trials:
    """Cases of each part."""

    def __init__(self, widths: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.widths, self.dtype, self.device = widths, dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def round(self, kernel: Callable[[Tensor], Rounded]) -> Iterator[Case]:
        for width in self.widths:
            yield _rounding(f"{width} columns", kernel, round_rows, self._draw((5, width)))

    def norm(self, kernel: Callable[..., Rounded]) -> Iterator[Case]:
        for width in self.widths:
            inputs = self._draw((5, width), (width,), (width,))
            run, plain = (partial(f, eps=EPS) for f in (kernel, norm_rows))
            yield _rounding(f"{width} columns", run, plain, inputs)

    def gelu(self, kernel: Callable[[Tensor], Rounded]) -> Iterator[Case]:
        for width in self.widths:
            yield _rounding(f"{width} columns", kernel, gelu_rows, self._draw((5, width)))

    def product(self, fp8: Fp8) -> Iterator[Case]:
        """Beside the same rounded numbers in fp32: that of an output, and that of a gradient."""

        def multiplied(by: Fp8, fast: bool, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
            return by.product(by.round(x), by.round(weight), bias[0] if bias else None, fast)

        plain = Fp8(product=emulated)
        for rows, out in ((19, 64), (64, self.widths[-1])):
            for fast in (True, False):
                width = self.widths[0]
                inputs = self._draw((rows, width), (out, width), *[(out,)] * fast)
                run, other = (partial(multiplied, by, fast) for by in (fp8, plain))
                yield Case(f"{rows} x {width} x {out}", run, other, inputs, gradients=False)

    def _draw(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        drawn = (torch.randn(shape, generator=self.generator) for shape in shapes)
        return tuple(x.to(self.device, self.dtype) for x in drawn)


def _rounding(
    name: str, kernel: Callable[..., Rounded], plain: Callable[..., Rounded], inputs: Any
) -> Case:
    def number(by: Callable[..., Rounded], *given: Tensor) -> Tensor:
        return by(*given).number()

    return Case(name, partial(number, kernel), partial(number, plain), inputs, gradients=False)
