"""Frames as bytes -> frames as the tower wants them."""

from __future__ import annotations

import torch
from torch import Tensor

from moss_train.config import VisionConfig
from moss_train.model.vision import tiles_used

# Means and deviations of Llama-3.2-Vision's image processor (CLIP's), for RGB in 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(
    frames: Tensor, ratio_ids: Tensor, vision: VisionConfig, dtype: torch.dtype
) -> Tensor:
    """uint8 `[N, T, 3, h, w]` -> normalized `dtype`, the unused tiles of a frame exactly zero."""
    shape = (3, 1, 1)
    mean = torch.tensor(MEAN, device=frames.device).view(shape)
    std = torch.tensor(STD, device=frames.device).view(shape)
    pixels = frames.float().div_(255).sub_(mean).div_(std)
    tiles = frames.shape[1]
    if tiles > 1:
        used = torch.arange(tiles, device=frames.device) < tiles_used(ratio_ids, vision)[:, None]
        pixels.mul_(used[:, :, None, None, None])
    return pixels.to(dtype)
