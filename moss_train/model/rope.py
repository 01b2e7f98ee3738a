"""Rotary position frequencies with Llama-3's scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moss_train.config import TextConfig


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


def rotary_angles(text: TextConfig, positions: Tensor) -> Tensor:
    """Angles of `positions` `[N]` (integers), fp32 `[N, 1, 1, head_dim]` as megatron wants them."""
    angles = positions.float()[:, None] * inverse_frequencies(text).to(positions.device)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]
