"""Pictures -> normalized pixels for the vision tower, as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_pipeline.images import IMAGE_MEAN, IMAGE_STD
from inference.engine.images import as_picture, fit
from inference.engine.upload import upload


class Pixels:
    """Cuts each picture to one tile and normalizes it: `[n, 1, 3, h, w]`."""

    def __init__(self, config: Any, processor: Any, device: torch.device):
        self.size, self.device = config.vision_config.image_size, device
        image = getattr(processor, "image_processor", None)
        mean = getattr(image, "image_mean", IMAGE_MEAN)
        std = getattr(image, "image_std", IMAGE_STD)
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))

    def __call__(self, images: Sequence[Image.Image | Tensor]) -> Tensor:
        normalized = [isinstance(image, Tensor) and image.is_floating_point() for image in images]
        pairs = list(zip(images, normalized, strict=True))
        made = iter(self._made([image for image, floats in pairs if not floats]))
        parts = [self._uploaded(image) if floats else next(made) for image, floats in pairs]
        return torch.stack(parts)[:, None]

    def _made(self, images: list[Image.Image | Tensor]) -> Tensor | tuple[()]:
        """Pictures cut to tiles and normalized: all in one copy to the device, of bytes."""
        if not images:
            return ()
        tiles = torch.stack([fit(as_picture(image).cpu(), self.size) for image in images])
        return upload(tiles, self.device).float().div_(255).sub_(self.mean).div_(self.std)

    def _uploaded(self, image: Image.Image | Tensor) -> Tensor:
        assert isinstance(image, Tensor)
        shape = (3, self.size, self.size)
        if image.shape != shape:
            raise ValueError(f"normalized pixels of {tuple(image.shape)}, expected {shape}")
        return upload(image, self.device)
