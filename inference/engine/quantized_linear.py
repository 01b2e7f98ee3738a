"""A linear layer whose weights are in 8 or 4 bits: int8 and fp8 (e4m3) with one scale a row, int4
with one for each group of 128 inputs (four_bit.py). Products are computed in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inference.engine.four_bit import round_to_four_bits
from inference.engine.staging import to_device
from inference.kernels import plain
from inference.kernels.choose import Kernels

INT8_KERNEL_TOKENS = 8  # up to so many tokens, torch's int8 kernel beats a product in full weights


@dataclass(frozen=True)
class Format:
    """How a weight is stored; `largest`: the value that the largest weight of a row gets."""

    dtype: torch.dtype
    largest: float

    def store(self, scaled: Tensor) -> Tensor:
        """Values from -largest to largest, rounded to the nearest that the format has."""
        scaled = scaled.clamp(-self.largest, self.largest)
        # A conversion to a floating-point format rounds; one to integers cuts off.
        return (scaled if self.dtype.is_floating_point else scaled.round()).to(self.dtype)


FORMATS = {"int8": Format(torch.int8, 127.0), "fp8": Format(torch.float8_e4m3fn, 448.0)}
FOUR_BITS = "int4"
KINDS = (*FORMATS, FOUR_BITS)


class QuantizedLinear(nn.Module):
    """`x @ w.T`, without bias, of weights `w` `[out, in]` in 8 or 4 bits.

    weight: `[out, in]` in int8 or fp8, or two int4 a byte, uint8 `[out, groups * 64]`.
    scale: `[out]`; of int4 `[out, groups]`; in the model's dtype.
    product: computes it, as `plain.product8` or `plain.product4` do; None: those.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        in_features: int,
        product: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, len(weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.product = product or self.product_of(Kernels())

    @classmethod
    def of(
        cls, linear: nn.Linear, kind: str, device: torch.device | None = None
    ) -> QuantizedLinear:
        """Quantizes a layer, on the device where it is to live (None: where it is)."""
        assert linear.bias is None
        full = linear.weight.detach()
        full = full if device is None else to_device(full, device)
        if kind == FOUR_BITS:
            return cls(*round_to_four_bits(full), linear.in_features)
        stored = FORMATS[kind]
        scale = (full.float().abs().amax(1) / stored.largest).to(full.dtype)
        scale = torch.where(scale == 0, 1.0, scale)  # of a row of zeros, or of less than it can be
        return cls(stored.store(full.float() / scale.float()[:, None]), scale, full.shape[1])

    @property
    def four_bits(self) -> bool:
        """Two numbers a byte."""
        return self.weight.dtype is torch.uint8

    def product_of(self, kernels: Kernels) -> Callable[..., Tensor]:
        """The operation that computes its product."""
        return kernels.product4 if self.four_bits else kernels.product8

    def full(self) -> Tensor:
        """The weights that the numbers stand for, `[out, in]` in the scale's dtype."""
        if self.four_bits:
            return plain.from_four_bits(self.weight, self.scale)[:, : self.in_features]
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if self._has_kernel(x):
            out = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)
            return out.unflatten(0, x.shape[:-1])
        out = self.product(x.flatten(0, -2), self.weight, self.scale)
        return out.unflatten(0, x.shape[:-1])

    def _has_kernel(self, x: Tensor) -> bool:
        """int8 weights and a few tokens in bf16 on a CPU: there torch reads the weights in 8 bits,
        half of what a product in bf16 reads. The kernel's fp32 form is slow."""
        few = x.numel() // x.shape[-1] <= INT8_KERNEL_TOKENS
        dtypes = (self.weight.dtype, x.dtype) == (torch.int8, torch.bfloat16)
        return dtypes and few and x.device.type == "cpu"
