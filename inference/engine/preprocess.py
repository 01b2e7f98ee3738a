"""Pictures -> normalized pixels for the vision tower, as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_pipeline.images import IMAGE_MEAN, IMAGE_STD
from inference.engine.images import as_picture, fit


class Pixels:
    """Cuts each picture to one tile and normalizes it: `[n, 1, 3, h, w]`."""

    def __init__(self, config: Any, processor: Any, device: torch.device):
        self.size, self.device = config.vision_config.image_size, device
        image = getattr(processor, "image_processor", None)
        mean = getattr(image, "image_mean", IMAGE_MEAN)
        std = getattr(image, "image_std", IMAGE_STD)
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))

    def __call__(self, images: Sequence[Image.Image | Tensor]) -> Tensor:
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Tensor) and image.is_floating_point():
            if image.shape != (3, self.size, self.size):
                wanted = (3, self.size, self.size)
                raise ValueError(f"normalized pixels of {tuple(image.shape)}, expected {wanted}")
            return image[None].to(self.device)
        tile = fit(as_picture(image).cpu(), self.size)[None]
        return tile.to(self.device).float().div_(255).sub_(self.mean).div_(self.std)
