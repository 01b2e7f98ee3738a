"""Matrix products in FP8, of training (`model.fp8`) and of an engine's vision tower.

Each row of a matrix is rounded to e4m3 (3 bits behind the point, up to 448; Micikevicius et al.
2022, "FP8 formats for deep learning") by one factor that its largest element sets. Factors are
powers of two, so that scaling is exact and a number is rounded once: by at most 2^-4 of it, or half
of the type's smallest step. Products are summed in fp32. A GPU multiplies by `torch._scaled_mm`, a
CPU the same rounded numbers in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from data_pipeline.devices import is_accelerator

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
MULTIPLE = 16  # of a weight's sides: what torch._scaled_mm takes
SMALLEST = 1e-30  # a row of zeros has the factor of this
EXPONENT = 0x7F800000  # the bits of an fp32 number that say its power of two


@dataclass(frozen=True)
class Rounded:
    """Numbers that were of `dtype`, `[..., k]`: `values * scale`.

    values: FP8 `[..., k]`. scale: fp32 `[..., 1]`.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Values `[m, k]` and scale `[m, 1]`."""
        return self.values.flatten(0, -2), self.scale.flatten(0, -2)

    def number(self) -> Tensor:
        """The rounded numbers, in fp32."""
        return self.values.float() * self.scale


Product = Callable[[Rounded, Rounded, Tensor | None, bool], Tensor]


def round_rows(x: Tensor) -> Rounded:
    """`[..., k]`, each row by its own factor."""
    most = torch.linalg.vector_norm(x, torch.inf, -1, True).float().clamp(min=SMALLEST)
    factor = (LARGEST / most).view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)
    return Rounded((x * factor.to(x.dtype)).to(FORMAT), factor.reciprocal(), x.dtype)


def norm_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Rounded:
    """LayerNorm of `[..., k]`, rounded."""
    return round_rows(layer_norm(x, weight.shape, weight, bias, eps))


def gelu_rows(hidden: Tensor) -> Rounded:
    """GELU of `[..., k]`, rounded."""
    return round_rows(gelu(hidden))


def multiply(left: Rounded, right: Rounded, bias: Tensor | None, fast: bool) -> Tensor:
    """`left @ right.T + bias`: `[..., k]`, `[n, k]`, `[n]` -> `[..., n]` of left's dtype. k and n
    are multiples of MULTIPLE. fast: sums keep 14 bits or so."""
    (a, scale_a), (b, scale_b) = left.rows, right.rows
    if not is_accelerator(a):
        return emulated(left, right, bias, fast)
    out = torch._scaled_mm(
        a, b.T, scale_a=scale_a, scale_b=scale_b.T, bias=bias, out_dtype=left.dtype,
        use_fast_accum=fast,
    )  # fmt: skip
    return out.view(*left.values.shape[:-1], -1)


def emulated(left: Rounded, right: Rounded, bias: Tensor | None, fast: bool) -> Tensor:
    """The same product on any device, computed in fp32."""
    (a, scale_a), (b, scale_b) = left.rows, right.rows
    out = (a.float() @ b.float().T) * (scale_a * scale_b.T)
    out = (out if bias is None else out + bias).to(left.dtype)
    return out.view(*left.values.shape[:-1], -1)


@dataclass(frozen=True)
class Fp8:
    """What a layer in FP8 computes with; a GPU's quicker forms are found in choose_fp8.py.

    norm and gelu write the input of a product rounded, where nobody needs it as it is.
    """

    round: Callable[[Tensor], Rounded] = round_rows
    norm: Callable[[Tensor, Tensor, Tensor, float], Rounded] = norm_rows
    gelu: Callable[[Tensor], Rounded] = gelu_rows
    product: Product = multiply
