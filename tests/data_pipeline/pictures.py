"""Pictures whose pixels are known: the table that every way into the model is held to."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE = 56
RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)


@dataclass(frozen=True)
class Known:
    """A file, and the colors of its four quarters: upper left and right, lower left and right."""

    name: str
    data: bytes
    quarters: tuple[RGB, RGB, RGB, RGB] | None  # None: refused
    refusal: str = ""  # what the reason names

    def pixels(self) -> np.ndarray:
        """uint8 [SIDE, SIDE, 3]."""
        assert self.quarters is not None
        return quarters(np.array(self.quarters, np.uint8))


def quarters(values: Any) -> np.ndarray:
    """[4, ...] -> [SIDE, SIDE, ...]."""
    array = np.asarray(values)
    half = SIDE // 2
    grid = array.reshape(2, 2, *array.shape[1:])
    return grid.repeat(half, 0).repeat(half, 1)


def file(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def grey(*values: int) -> Any:
    return tuple((value, value, value) for value in values)


def png(values: list[int], depth: int, kind: int, clear: bytes) -> bytes:
    """A PNG with a transparent color (tRNS), which Pillow does not write; `kind` 0 grey, 2 RGB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    per_pixel = 3 if kind == 2 else 1
    pixels = quarters(np.array(values).reshape(4, per_pixel)).reshape(SIDE, SIDE * per_pixel)
    if depth == 16:
        rows = pixels.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(SIDE, -1), axis=1)
    raw = np.hstack([np.zeros((SIDE, 1), np.uint8), rows]).tobytes()
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([
        chunk(b"IHDR", header), chunk(b"tRNS", clear),
        chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b""),
    ])  # fmt: skip


# Upper left, upper right, lower left, lower right.
R, G, B, Y = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)
# EXIF orientation -> the quarters as they are to be seen, of a file whose rows hold R G / B Y.
TURNS = {
    2: (G, R, Y, B),  # mirrored
    3: (Y, B, G, R),  # half a turn
    4: (B, Y, R, G),
    5: (R, B, G, Y),
    6: (B, R, Y, G),  # a quarter clockwise
    7: (Y, G, B, R),
    8: (G, Y, R, B),
}


# Turned by 6, and a resolution (0x11A) that is a text in place of a number.
_ODD_EXIF = b"Exif\0\0" + struct.pack(
    "<2sHIHHHIHHHHI2sHI", b"II", 42, 8, 2, 0x112, 3, 1, 6, 0, 0x11A, 2, 2, b"x", 0, 0
)


def turned(values: np.ndarray, orientation: int, form: str = "PNG", **options: Any) -> bytes:
    image = Image.fromarray(quarters(values))
    exif = image.getexif()
    exif[0x0112] = orientation
    return file(image, form, exif=exif, **options)


def big_endian_tiff(values: np.ndarray) -> bytes:
    pixels = quarters(values).astype(">u2").tobytes()
    return file(Image.frombytes("I;16B", (SIDE, SIDE), pixels), "TIFF")


def pgm(values: np.ndarray) -> bytes:
    return b"P5 %d %d 65535\n" % (SIDE, SIDE) + quarters(values).astype(">u2").tobytes()


def _made() -> list[Known]:
    four = np.array([R, G, B, Y], np.uint8)
    sixteen = np.array([0, 0x4142, 0x8283, 0xFFFF], np.uint16)
    ramp, steps = grey(0, 0x41, 0x82, 255), [int(value) for value in sixteen]
    deep = Image.fromarray(quarters(sixteen))
    colors = [0x1234, 0, 0, 0xFF00, 0x8000, 0, 0, 0, 0, 0, 0, 0x0100]
    clear_color, clear_grey = struct.pack(">3H", 0xFF00, 0x8000, 0), struct.pack(">H", 0x4142)
    rgba = np.array([(*R, 255), (*G, 0), (*B, 255), (0, 0, 0, 128)], np.uint8)
    alpha, on_white = Image.fromarray(quarters(rgba)), (R, WHITE, B, (127, 127, 127))
    two = quarters(np.array([(0, 255), (0, 0), (90, 255), (0, 128)], np.uint8))
    palette = Image.fromarray(quarters(four)).quantize(4)
    clear = int(np.asarray(palette)[0, -1])  # the entry of the upper right quarter
    bits = Image.fromarray(quarters(np.array([0, 255, 255, 0], np.uint8))).convert("1")
    inks = [(0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)]
    printed = Image.frombytes("CMYK", (SIDE, SIDE), quarters(np.array(inks, np.uint8)).tobytes())
    floats = Image.fromarray(quarters(np.array([0, 0.3, 0.6, 1], np.float32)))
    integers = Image.fromarray(quarters(np.array([0, 9, 99, 65535], np.int32)))
    inverted = file(deep, "TIFF", tiffinfo={262: 0})
    return [
        Known("RGB", file(Image.fromarray(quarters(four)), "PNG"), (R, G, B, Y)),
        Known("16-bit grey PNG", file(deep, "PNG"), ramp),
        Known("16-bit grey TIFF", file(deep, "TIFF"), ramp),
        Known("16-bit grey TIFF, high byte first", big_endian_tiff(sixteen), ramp),
        Known("16-bit grey TIFF, 0 is white", inverted, grey(255, 255 - 0x41, 255 - 0x82, 0)),
        Known("16-bit grey PGM", pgm(sixteen), ramp),
        Known("16-bit grey, one transparent", png(steps, 16, 0, clear_grey),
              grey(0, 255, 0x82, 255)),
        Known("16-bit RGB, one transparent", png(colors, 16, 2, clear_color),
              ((0x12, 0, 0), WHITE, (0, 0, 0), (0, 0, 1))),
        Known("2-bit grey, one transparent", png([0, 1, 2, 3], 2, 0, b"\0\1"),
              grey(0, 255, 170, 255)),
        Known("8-bit grey, one transparent", png([0, 17, 40, 90], 8, 0, b"\0\x11"),
              grey(0, 255, 40, 90)),
        Known("RGB and alpha", file(alpha, "PNG"), on_white),
        Known("RGB and alpha in WebP", file(alpha, "WEBP", lossless=True), on_white),
        Known("grey and alpha", file(Image.fromarray(two), "PNG"), grey(0, 255, 90, 127)),
        Known("palette", file(palette, "PNG"), (R, G, B, Y)),
        Known("palette, one transparent", file(palette, "PNG", transparency=clear),
              (R, WHITE, B, Y)),
        Known("GIF, one transparent", file(palette, "GIF", transparency=clear), (R, WHITE, B, Y)),
        Known("1 bit", file(bits, "PNG"), grey(0, 255, 255, 0)),
        Known("CMYK", file(printed, "TIFF"), ((255, 0, 0), (0, 255, 0), (0, 0, 0), WHITE)),
        Known("32-bit floats", file(floats, "TIFF"), None, "mode F"),
        Known("32-bit integers", file(integers, "TIFF"), None, "mode I"),
        *(Known(f"EXIF orientation {n}", turned(four, n), seen) for n, seen in TURNS.items()),
        Known("EXIF turn in WebP", turned(four, 6, "WEBP", lossless=True), TURNS[6]),
        Known("EXIF turn of 16-bit grey", turned(sixteen, 6), grey(0x82, 0, 255, 0x41)),
        *(Known(f"broken EXIF in {form}", file(Image.fromarray(quarters(four)), form,
                                               exif=b"Exif\0\0" + broken, **options), (R, G, B, Y))
          for form, options in (("PNG", {}), ("WEBP", {"lossless": True}))
          for broken in (b"no TIFF", b"II*\0")),
        *(Known(f"EXIF turn beside an odd resolution in {form}",
                file(Image.fromarray(quarters(four)), form, exif=_ODD_EXIF, **options), TURNS[6])
          for form, options in (("PNG", {}), ("WEBP", {"lossless": True}))),
        Known("broken EXIF of 16-bit grey", file(deep, "PNG", exif=b"Exif\0\0II*\0"), ramp),
    ]  # fmt: skip


PICTURES = _made()


@dataclass(frozen=True)
class Array:
    """Pixels in a program's memory."""

    name: str
    given: Any
    pixels: np.ndarray | None  # uint8 [H, W, 3]; None: refused
    refusal: str = ""  # what the reason names


def _arrays() -> list[Array]:
    grey = np.array([[0, 100, 255]] * 5, np.uint8)  # [5, 3]
    three = grey[..., None].repeat(3, 2)  # [5, 3, 3]
    color = np.stack([grey, 255 - grey, grey], axis=2)
    wide = np.tile(color, (1, 4, 1))  # [5, 12, 3]
    clear = np.dstack([color, np.zeros((5, 3), np.uint8)])
    opaque = np.dstack([color, np.full((5, 3), 255, np.uint8)])
    return [
        Array("[H, W]", grey, three),
        Array("[H, W, 1]", grey[..., None], three),
        Array("[H, W, 3]", color, color),
        Array("[H, W, 3], wide", wide, wide),
        Array("[H, W, 3], not contiguous", wide[:, ::2], wide[:, ::2]),
        Array("[3, H, W]", wide.transpose(2, 0, 1), wide),
        Array("[H, W, 4], clear", clear, np.full_like(color, 255)),
        Array("[H, W, 4], opaque", opaque, color),
        Array("bool [H, W]", grey > 50, (three > 50).astype(np.uint8) * 255),
        Array("tensor [H, W]", torch.tensor(grey), three),
        Array("tensor [1, H, W]", torch.tensor(grey)[None], three),
        Array("tensor [3, H, W]", torch.tensor(color).permute(2, 0, 1), color),
        Array("tensor [4, H, W]", torch.tensor(opaque).permute(2, 0, 1), color),
        Array("floats", np.zeros((4, 4, 3), np.float32), None, r"float32 \[4, 4, 3\]"),
        Array("uint16", np.zeros((4, 4), np.uint16), None, r"uint16 \[4, 4\]"),
        Array("int64", np.zeros((4, 4, 3), np.int64), None, "int64"),
        Array("seven channels", np.zeros((5, 6, 7), np.uint8), None, r"uint8 \[5, 6, 7\]"),
        Array("a batch", np.zeros((2, 4, 4, 3), np.uint8), None, r"uint8 \[2, 4, 4, 3\]"),
        Array("no rows", np.zeros((0, 4, 3), np.uint8), None, r"uint8 \[0, 4, 3\]"),
        Array("a tensor of floats", torch.zeros(3, 4, 4), None, r"float32 \[3, 4, 4\]"),
    ]


ARRAYS = _arrays()
