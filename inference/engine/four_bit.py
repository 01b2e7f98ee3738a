"""Weights in 4 bits: each group of 128 inputs of a row has 16 numbers, a scale apart.

A weight is `scale * number`, of a number from -8 to 7. The scale has the sign with which the
group's largest weight is negative, so that all 16 numbers are of use. By a scale that is a little
smaller the largest weights are cut off and the others are closer: of some factors the one with the
least squared error is taken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.kernels.plain import GROUP

LOWEST, HIGHEST = -8, 7
FACTORS = (1.0, 0.9, 0.8)  # of the scale by which nothing is cut off
CHUNK = 1 << 20  # weights that are rounded at once: what this takes beside them stays small


def round_to_four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight `[out, in]`, of any number of inputs: the last group is filled with zeros.

    Returns:
        As `plain.product4` reads them: two numbers a byte, uint8 `[out, groups * 64]`; the scales
        in the weight's dtype, `[out, groups]`.
    """
    rows = weight.detach().split(max(1, CHUNK // weight.shape[1]))
    packed, scales = zip(*map(_rounded, rows), strict=True)
    return torch.cat(packed), torch.cat(scales)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    empty = -weight.shape[1] % GROUP
    groups = F.pad(weight.float(), (0, empty)).unflatten(1, (-1, GROUP))
    place = groups.abs().argmax(-1, keepdim=True)
    widest = groups.gather(-1, place) / LOWEST  # [out, groups, 1]
    best, numbers = _nearest(groups, widest, weight.dtype)
    least = _error(groups, best, numbers)
    for factor in FACTORS[1:]:
        scale, other = _nearest(groups, widest * factor, weight.dtype)
        error = _error(groups, scale, other)
        better = error < least
        least = torch.where(better, error, least)
        best, numbers = torch.where(better, scale, best), torch.where(better, other, numbers)
    low, high = (numbers - LOWEST).to(torch.uint8).chunk(2, -1)
    return (low | high << 4).flatten(1), best[..., 0].to(weight.dtype)


def _nearest(groups: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scale as it is kept in `dtype`, and the numbers that are nearest by it."""
    kept = scale.to(dtype).float()
    kept = torch.where(kept == 0, 1.0, kept)  # of a group of zeros
    return kept, (groups / kept).round().clamp(LOWEST, HIGHEST)


def _error(groups: Tensor, scale: Tensor, numbers: Tensor) -> Tensor:
    """The squared error of each group, `[out, groups, 1]`."""
    return (numbers * scale - groups).square().sum(-1, keepdim=True)
