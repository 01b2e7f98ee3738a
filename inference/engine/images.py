"""Pictures of users and clients, in any of their forms -> uint8 [3, H, W]."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.images import decode_image, picture_pixels, tile_into
from data_pipeline.schema import SampleError

Picture = Tensor | np.ndarray | Image.Image | bytes


def as_picture(image: Picture) -> Tensor:
    """A PIL image, an array [H, W, 3], a tensor [3, H, W] (uint8 each) or a JPEG's bytes.

    Bytes and PIL images have the pixels of `data_pipeline.pixels.to_rgb`. Raises
    SampleError(`undecodable_image`) where they are broken or have no stated range, TypeError for
    anything else.
    """
    if isinstance(image, bytes):
        return decode_image(image)
    if isinstance(image, Image.Image):
        return picture_pixels(image)
    kind: Any = image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.shape[:-2] == (3,):
        return image
    given = f"{type(kind).__name__} {getattr(kind, 'dtype', '')} {getattr(kind, 'shape', '')}"
    raise TypeError(f"a picture is a uint8 [3, H, W], [H, W, 3], a PIL image or bytes: {given}")


def fit(picture: Tensor, tile: int) -> Tensor:
    """The picture as the one tile that the model sees of it, uint8 [3, tile, tile]."""
    if picture.shape == (3, tile, tile):
        return picture
    out = torch.zeros(1, 3, tile, tile, dtype=torch.uint8)
    tile_into(out, picture)
    return out[0]


def check_header(data: bytes, max_pixels: int) -> None:
    """Refuses a picture by its header, before anything is decoded.

    Raises SampleError: `undecodable_image`, or `too_many_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError("undecodable_image", f"{len(data)} bytes: {error}") from None
    _check_pixels(width, height, max_pixels)


def check_video(data: bytes, max_pixels: int) -> None:
    """Refuses a video by its header, before a frame is decoded; SampleError as `check_header`."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            sizes = [
                (s.codec_context.width, s.codec_context.height) for s in container.streams.video
            ]
    except (av.FFmpegError, ValueError, AttributeError) as error:
        raise SampleError("undecodable_video", f"{len(data)} bytes: {error}") from None
    for width, height in sizes:
        _check_pixels(width, height, max_pixels)


def _check_pixels(width: int, height: int, most: int) -> None:
    if width * height > most:
        raise SampleError("too_many_pixels", f"{width} x {height} pixels are more than {most}")
