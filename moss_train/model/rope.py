"""Rotary position embedding with Llama-3's scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moss_train.model_config import TextConfig
from moss_train.transfer import constant


def inverse_frequencies(text: TextConfig) -> Tensor:
    """Rotations per position in radians, fp32 `[head_dim / 2]`.

    Long wavelengths are slowed by `factor`, short ones kept, those between interpolated (the
    llama3 rule of Llama 3.1; transformers' modeling_rope_utils computes the same).
    """
    exponents = torch.arange(0, text.head_dim, 2, dtype=torch.float32) / text.head_dim
    inverse = 1.0 / text.rope_theta**exponents
    scaling = text.rope_scaling
    wavelength = 2 * math.pi / inverse
    ratio = scaling.original_max_position / wavelength
    smooth = (ratio - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)  # 0: long wavelength, fully scaled; 1: short, kept
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


@dataclass
class Rotation:
    """Cosines and sines of N positions, `[N, 1, head_dim]`: made once for all layers."""

    cos: Tensor
    sin: Tensor
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls,
        text: TextConfig,
        positions: Tensor,
        dtype: torch.dtype,
        kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Rotation:
        """Angles are computed in fp32, whatever `dtype` the cosines are kept in. `kernel`: in place
        of `rotate`.
        """
        inverse = tuple(inverse_frequencies(text).tolist())
        angles = positions.float()[:, None] * constant(inverse, torch.float32, positions.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return cls(angles.cos().to(dtype), angles.sin().to(dtype), kernel)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates `[N, ..., heads, head_dim]`: halves of a head are the pairs, as in Llama."""
        return (self.kernel or rotate)(x, self.cos, self.sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[N, ..., D]` by the angles of `[N, 1, D]`."""
    shape = (len(x), *[1] * (x.dim() - 2), x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.view(shape) + turned * sin.view(shape)
