"""The toy world to real files: PNG-like arrays, JPEG pictures, H.264 videos."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.toy.world import COLOURS, Story, Thing

_BACKGROUND = (20, 20, 24)
_SCALE = 2  # drawn larger and reduced, for smooth edges


def draw(things: Sequence[Thing], size: int) -> Image.Image:
    """An RGB picture of size x size pixels of the things that are present."""
    picture = Image.new("RGB", (size * _SCALE, size * _SCALE), _BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for thing in things:
        if thing.present:
            _draw_thing(pen, thing)
    return picture.reduce(_SCALE)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r = thing.x * _SCALE, thing.y * _SCALE, thing.radius * _SCALE
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=fill)
    elif thing.shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=fill)
    elif thing.shape == "diamond":
        pen.polygon([(x, y - r), (x + 0.7 * r, y), (x, y + r), (x - 0.7 * r, y)], fill=fill)
    else:
        pen.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), fill=fill)
        pen.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), fill=fill)


def jpeg(things: Sequence[Thing], size: int) -> bytes:
    out = io.BytesIO()
    draw(things, size).save(out, "JPEG", quality=92)
    return out.getvalue()


def mp4(story: Story) -> bytes:
    """The story as H.264 in an MP4, `story.fps` frames a second, a frame a state."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=story.fps)
        stream.width = stream.height = story.size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "preset": "ultrafast"}
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        for things in story.frames:
            pixels = np.asarray(draw(things, story.size))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()
