"""Pictures to tiles, as Llama-3.2-Vision's image processor makes them (without normalizing).

Sizes are (height, width) and grids of tiles (tiles high, tiles wide) throughout.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data_pipeline.aspect_ratios import supported_aspect_ratios
from data_pipeline.pixels import to_rgb
from data_pipeline.schema import SampleError

# Means and deviations of Llama-3.2-Vision's image processor (CLIP's), for RGB in 0..1.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_STILLS = {b"avif": "an AVIF", b"avis": "an AVIF"} | dict.fromkeys(  # by the file's brand
    (b"heic", b"heix", b"heim", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC"
)


@lru_cache(maxsize=1024)
def choose_grid(height: int, width: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """The grid that enlarges the picture least, else shrinks it least, else has fewest tiles."""
    grids = supported_aspect_ratios(max_tiles)
    scales = [min(high * tile / height, wide * tile / width) for high, wide in grids]
    enlarging = [scale for scale in scales if scale >= 1]
    best = min(enlarging) if enlarging else max(scales)
    candidates = [grid for grid, scale in zip(grids, scales, strict=True) if scale == best]
    return min(candidates, key=lambda grid: grid[0] * grid[1])


def fit_size(height: int, width: int, grid: tuple[int, int], tile: int) -> tuple[int, int]:
    """The picture's size inside the canvas: aspect ratio kept, the longer limit touched."""
    target_height = min(max(height, tile), grid[0] * tile)
    target_width = min(max(width, tile), grid[1] * tile)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(int(height * scale_width) or 1, target_height), target_width
    return target_height, min(int(width * scale_height) or 1, target_width)


def tile_image(image: Tensor, tile: int, max_tiles: int) -> tuple[Tensor, int]:
    """uint8 [3, H, W] -> (uint8 [max_tiles, 3, tile, tile], aspect ratio id)."""
    out = torch.zeros(max_tiles, 3, tile, tile, dtype=torch.uint8)
    return out, tile_into(out, image)


def tile_into(out: Tensor, image: Tensor) -> int:
    """Resizes a picture, cuts it into tiles and returns the aspect ratio id.

    out: uint8 zeros [max_tiles, 3, tile, tile]; the tiles go there row by row. What the picture
    does not fill, right and below and in the tiles beyond the grid, stays zero. image: uint8
    [3, H, W]; fastest with the strides that `decode_image` gives.
    """
    max_tiles, tile = out.shape[0], out.shape[-1]
    height, width = image.shape[-2:]
    high, wide = grid = choose_grid(height, width, tile, max_tiles)
    size = fit_size(height, width, grid, tile)
    if size != (height, width):
        image = _resize(image, size)
    for row in range(high):
        for column in range(wide):
            piece = image[:, row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
            out[row * wide + column, :, : piece.shape[1], : piece.shape[2]] = piece
    return supported_aspect_ratios(max_tiles).index(grid) + 1


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if image.stride(2) == 4 and not image.storage_offset():
        # The fourth byte of PIL's pixels: with it torch resizes without copying them first.
        image = image.as_strided((4, *image.shape[1:]), image.stride())
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0, :3]


def decode_image(data: bytes, formats: tuple[str, ...] | None = None) -> Tensor:
    """JPEG, PNG, ... bytes -> uint8 [3, H, W], with the pixels of `to_rgb`.

    formats: Pillow's names of those that it may be in; None: all that are known.
    Strides are those of [H, W, 3] or [H, W, 4]. Raises SampleError(`undecodable_image`).
    """
    try:
        with Image.open(io.BytesIO(data), formats=formats) as opened:
            return _pixels(to_rgb(opened)).permute(2, 0, 1)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise SampleError("undecodable_image", f"{len(data)} bytes: {other_kind(data)}") from None
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise SampleError("undecodable_image", f"{len(data)} bytes: {error}") from None


def other_kind(data: bytes) -> str:
    """What it is that Pillow does not know, where that is plain."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    still = _STILLS.get(head[8:12]) if head[4:8] == b"ftyp" else None
    if still and b"avif" in head[16:64]:  # its first brand may be that of both
        still = _STILLS[b"avif"]
    kinds = [
        (b"<svg" in head, "an SVG drawing: give it as PNG, JPEG, WebP or GIF"),
        (head.startswith((b"<!doctype", b"<html")), "an HTML page"),
        (head.startswith(b"%pdf"), "a PDF: give its pages as pictures"),
        (bool(still), f"{still} picture: give it as JPEG or PNG"),
        (head[4:8] == b"ftyp" or head.startswith(b"\x1ae\xdf\xa3"), "a video: give it as one"),
    ]
    return next((words for right, words in kinds if right), "no picture in a format that is known")


def picture_pixels(picture: Any) -> Tensor:
    """A PIL image, an array or a tensor, as `to_rgb` takes them -> uint8 [3, H, W].

    Raises SampleError(`undecodable_image`).
    """
    try:
        return _pixels(to_rgb(picture)).permute(2, 0, 1)
    except MemoryError:
        raise
    except Exception as error:
        raise SampleError("undecodable_image", str(error)) from None


def read_picture(picture: Any) -> Tensor:
    """A file's path or bytes, or what `picture_pixels` takes -> uint8 [3, H, W].

    Raises SampleError(`undecodable_image`); OSError where a file cannot be read.
    """
    if isinstance(picture, str | Path):
        picture = Path(picture).read_bytes()
    if isinstance(picture, bytes | bytearray | memoryview):
        return decode_image(bytes(picture))
    return picture_pixels(picture)


def _pixels(image: Image.Image) -> Tensor:
    """[H, W, 3] of an RGB image: its own memory, of four bytes a pixel, or a copy."""
    try:
        stored = pyarrow.array(image).flatten()
    except ValueError:  # the rows of a large picture lie in several blocks
        return torch.from_numpy(np.array(image))
    return torch.from_dlpack(stored).view(image.height, image.width, 4)[..., :3]
