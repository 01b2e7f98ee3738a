"""Frames as bytes -> frames as the tower wants them."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.images import IMAGE_MEAN, IMAGE_STD
from moss_train.model.vision import tiles_used
from moss_train.model_config import VisionConfig


def normalize(
    frames: Tensor, ratio_ids: Tensor, vision: VisionConfig, dtype: torch.dtype
) -> Tensor:
    """uint8 `[N, T, 3, h, w]` -> normalized `dtype`, the unused tiles of a frame exactly zero.

    (byte / 255 - mean) / std in two passes, tile by tile: a third of the time on a CPU.
    """
    scale = 1 / (255 * torch.tensor(IMAGE_STD, device=frames.device).view(3, 1, 1))
    shift = torch.tensor(IMAGE_MEAN, device=frames.device).view(3, 1, 1) * 255 * scale
    tiles = frames.shape[1]
    used = tiles_used(ratio_ids, vision) if tiles > 1 else torch.ones_like(ratio_ids)
    pixels = torch.zeros(frames.shape, dtype=dtype, device=frames.device)
    for tile in range(min(tiles, int(used.max())) if len(used) else 0):
        torch.sub(frames[:, tile].float().mul_(scale), shift, out=pixels[:, tile])
        pixels[used <= tile, tile] = 0
    return pixels
