"""Pictures of users and clients, in any of their forms -> uint8 [3, H, W]."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data_pipeline.images import other_kind, read_picture, tile_into
from data_pipeline.schema import SampleError

Picture = str | Path | bytes | Image.Image | np.ndarray | Tensor


def as_picture(image: Picture) -> Tensor:
    """A file's path or bytes, a PIL image, an array or a tensor -> uint8 [3, H, W].

    The pixels are those of `data_pipeline.pixels.to_rgb`, as in training. Raises
    SampleError(`undecodable_image`) for what is broken or has no stated range, OSError where a file
    cannot be read.
    """
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[:-2] == (3,):
        return image  # what `read_picture` would copy
    return read_picture(image)


def fit(picture: Tensor, tile: int) -> Tensor:
    """The picture as the one tile that the model sees of it, uint8 [3, tile, tile], a copy."""
    if picture.shape == (3, tile, tile):
        return picture.clone()
    out = torch.zeros(1, 3, tile, tile, dtype=torch.uint8)
    tile_into(out, picture)
    return out[0]


def check_header(data: bytes, max_pixels: int, formats: tuple[str, ...] | None = None) -> None:
    """Refuses a picture by its header, before anything is decoded. formats: as in `decode_image`.

    Raises SampleError: `undecodable_image`, or `too_many_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as opened:
            width, height = opened.size
    except UnidentifiedImageError:
        raise SampleError("undecodable_image", f"{len(data)} bytes: {other_kind(data)}") from None
    except Image.DecompressionBombError:  # names a limit of Pillow's, which is larger
        raise SampleError("too_many_pixels", f"it has many more than {max_pixels}") from None
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise SampleError("undecodable_image", f"{len(data)} bytes: {error}") from None
    if width * height > max_pixels:
        words = f"{width} x {height} pixels are more than {max_pixels}"
        raise SampleError("too_many_pixels", words)
