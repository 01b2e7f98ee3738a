"""What the pixels of a picture are: RGB in 8 bits, upright, on white where it is transparent.

`inference/hf/pixels_moss_video.py`, which exports carry along, is a copy of this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112  # EXIF: how the stored picture is turned or mirrored to be shown
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF
# Formats whose 16-bit grey Pillow opens in mode I, brought to 0..65535.
_SIXTEEN_BITS = ("PNG", "PPM")
_NO_RANGE = {"I": "32-bit integers", "F": "32-bit floats"}
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
# What a step of a PNG's 2-bit or 4-bit grey is in 8 bits; its transparent value is not scaled.
_GREY_STEPS = {"L;2": 85, "L;4": 17}


def to_rgb(picture: Any) -> Image.Image:
    """The pixels that every part of this project gives the model.

    Turned as its EXIF orientation says, the alpha channel, palette entries and colours that are
    transparent put on white, 16 bits brought to 8 by their higher byte.

    Args:
        picture: a PIL image; an array of uint8 or bool, [H, W], [H, W, C], or [C, H, W] where only
            the first axis can be the channels; a torch tensor, [H, W] or [C, H, W]. C: 1 grey,
            2 grey and alpha, 3 RGB, 4 RGBA.

    Raises:
        ValueError: there is no rule that says which value is white: 32-bit integers, floats,
            arrays of another type or shape. The message names the mode, or type and shape.
        OSError, SyntaxError and others of Pillow: the picture's bytes are broken.
    """
    if not isinstance(picture, Image.Image):
        picture = _from_array(picture)
    _scale_transparent_color(picture)
    deep = picture.mode.startswith("I;16") or (
        picture.mode == "I" and picture.format in _SIXTEEN_BITS
    )
    if picture.mode in _NO_RANGE and not deep:
        raise ValueError(
            f"mode {picture.mode} ({_NO_RANGE[picture.mode]}) has no stated range: "
            "store the picture with 8 or 16 bits"
        )
    if deep:
        picture = _eight_bits(picture)
    # Not ImageOps.exif_transpose: it writes the other EXIF data, too, and fails at odd ones.
    upright = _UPRIGHT.get(_exif(picture).get(_ORIENTATION, 1))
    if upright is not None:
        picture = picture.transpose(upright)
    if picture.mode in _ALPHA or "transparency" in picture.info:
        picture = _on_white(picture)
    # convert() copies the pixels even where there is nothing to convert.
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def frame_pixels(frame: Any, stream: Any) -> np.ndarray:
    """RGB of a decoded frame of PyAV, uint8 [H, W, 3], on white where it is transparent.

    As wide as players show it, where the pixels of its stream are not square. Turned and mirrored
    as its display matrix says, to the nearest right angle.
    """
    clear = any(component.is_alpha for component in frame.format.components)
    # One thread: starting one for each core and frame costs more than converting a small picture.
    pixels: np.ndarray = frame.to_ndarray(
        format="rgba" if clear else "rgb24", threads=1, width=shown_width(frame.width, stream)
    )
    if clear:
        pixels = np.array(_on_white(Image.fromarray(pixels)).convert("RGB"))  # writable
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None:
        return pixels
    # x is shown at a x + c y, y at b x + d y.
    a, b, _, c, d, *_ = np.frombuffer(bytes(stored), np.int32)
    if abs(int(b)) + abs(int(c)) > abs(int(a)) + abs(int(d)):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def shown_width(width: int, stream: Any) -> int:
    """How wide frames of a video stream are shown that are stored so wide, at the same height.

    DVDs and camcorders store pixels that are not square. A shape that none has is not believed.
    """
    shape = float(stream.sample_aspect_ratio or 1)  # width / height of a pixel
    return max(1, round(width * shape)) if 0.25 <= shape <= 4 else width


def _exif(picture: Image.Image) -> Image.Exif:
    """A picture's EXIF data; none where they are broken: its pixels are not."""
    picture.load()  # a PNG's may stand behind its pixels
    try:
        return picture.getexif()
    except Exception:  # Pillow raises errors of many kinds
        return Image.Exif()


def _scale_transparent_color(picture: Image.Image) -> None:
    """Pillow brings a PNG's values to 8 bits, but not the one of them that is transparent."""
    tiles: Any = getattr(picture, "tile", None)  # until it is decoded
    stored = tiles[0][3] if tiles else ""
    clear = picture.info.get("transparency")
    if isinstance(clear, int) and stored in _GREY_STEPS:
        picture.info["transparency"] = clear * _GREY_STEPS[stored]
    elif isinstance(clear, tuple) and (stored == "RGB;16B" or max(clear) > 255):
        picture.info["transparency"] = tuple(value >> 8 for value in clear)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with alpha where one of its values is transparent."""
    values = np.asarray(picture)
    grey = (values.clip(0, 65535) >> 8).astype(np.uint8)
    if getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey  # Pillow does so with 8 bits alone
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        alpha = np.where(values == clear, 0, 255).astype(np.uint8)
        made = Image.fromarray(np.stack([grey, alpha], axis=2))
    else:
        made = Image.fromarray(grey)
    made.getexif().update(_exif(picture))
    return made


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("La", "RGBa"):  # the colours are multiplied by their alpha
        picture = picture.convert(picture.mode.upper())
    layer = picture.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer)


def _from_array(source: Any) -> Image.Image:
    """A PIL image of an array or tensor."""
    tensor = hasattr(source, "detach")
    array = np.asarray(source.detach().cpu() if tensor else source)
    shape = array.shape
    refused = ValueError(
        f"an array of {array.dtype} {list(shape)}: a picture is uint8, [H, W], [H, W, C] or "
        "[C, H, W] with 1 to 4 channels: scale its values to 0..255"
    )
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in shape:
        raise refused
    if array.ndim == 2:
        array = array[..., None]
    elif shape[0] in (1, 2, 3, 4) and (tensor or shape[2] not in (1, 2, 3, 4)):
        array = np.moveaxis(array, 0, 2)
    channels = array.shape[2]
    if channels not in (1, 2, 3, 4):
        raise refused
    pixels = np.ascontiguousarray(array[..., 0] if channels == 1 else array)
    return Image.fromarray(pixels)
