"""The toy world to real files: JPEG pictures, H.264 videos.

Two things make events visible in a single frame, so that a model can learn them within minutes. The
frame of an event's second has its trace: a streak behind a shape that moved, a ring of the old
colour around one that turned, a glow behind one that came, the outline of one that left. And the
background has another dark colour in each second.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.toy.world import COLOURS, State, Story, Thing

# Colours of the background, one for each second, repeated.
SKY = ((20, 20, 24), (80, 20, 20), (20, 65, 20), (20, 20, 95), (65, 65, 15), (70, 15, 75))
_SCALE = 2  # drawn larger and reduced, for smooth edges
_START, _END = 0.25, 0.75  # of a second: when a change begins to show, and when it is done


def draw(state: State, size: int, second: int = 0, was: State | None = None) -> Image.Image:
    """An RGB picture of size x size pixels.

    `was`: the state a second ago, whose differences leave their traces; None for none.
    """
    side = size * _SCALE
    picture = Image.new("RGB", (side, side), SKY[second % len(SKY)])
    pen = ImageDraw.Draw(picture)
    old = {thing.shape: thing for thing in (state if was is None else was)}
    new = {thing.shape: thing for thing in state}
    for shape in old.keys() - new.keys():
        _draw_thing(pen, old[shape], side, outline=True)
    for thing in state:
        _draw_below(pen, old.get(thing.shape), thing, side)
    for thing in state:
        _draw_thing(pen, thing, side)
        turned = thing.shape in old and old[thing.shape].colour != thing.colour
        if turned:
            ring = COLOURS[old[thing.shape].colour]
            pen.ellipse(_box(thing, side, 1.0), outline=ring, width=side // 22)
    return picture.reduce(_SCALE)


def _draw_below(pen: ImageDraw.ImageDraw, old: Thing | None, new: Thing, side: int) -> None:
    """The glow behind a shape that came, the streak behind one that moved."""
    if old is None:
        pen.ellipse(_box(new, side, 1.12), fill=(150, 150, 150))
    elif old.place != new.place:
        dim = tuple(part * 2 // 3 for part in COLOURS[new.colour])
        ends = [side * part for part in (*old.centre, *new.centre)]
        pen.line(ends, fill=dim, width=side // 8)


def _box(thing: Thing, side: int, scale: float) -> tuple[float, float, float, float]:
    """The square around a thing."""
    x, y, r = (side * part for part in (*thing.centre, scale * thing.radius))
    return (x - r, y - r, x + r, y + r)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, side: int, outline: bool = False) -> None:
    x, y = (side * part for part in thing.centre)
    r, colour = side * thing.radius, COLOURS[thing.colour]
    how = {"outline": colour, "width": side // 28} if outline else {"fill": colour}
    if thing.shape == "circle":
        pen.ellipse(_box(thing, side, 1.0), **how)
    elif thing.shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), **how)
    elif thing.shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], **how)
    else:
        pen.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), **how)
        pen.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), **how)


def jpeg(state: State, size: int, second: int = 0, was: State | None = None) -> bytes:
    """As `draw`."""
    out = io.BytesIO()
    draw(state, size, second, was).save(out, "JPEG", quality=92)
    return out.getvalue()


def mp4(story: Story, size: int, fps: int) -> bytes:
    """The story as H.264 in an MP4 with `fps` frames a second, `len(story.states)` seconds long."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "preset": "ultrafast"}
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        shown: Any = None
        for frame in range(len(story.states) * fps):
            second, rest = divmod(frame, fps)
            was = story.states[second - 1] if second and not rest else None
            now = (between(story, frame / fps), size, second, was)
            if now != shown:
                shown, pixels = now, np.asarray(draw(*now))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def between(story: Story, time: float) -> State:
    """What is seen at `time` seconds: after the last state's second nothing changes any more."""
    second = min(int(time), len(story.states) - 1)
    done = min(max((time - second - _START) / (_END - _START), 0.0), 1.0)
    before, after = story.states[second], story.states[min(second + 1, len(story.states) - 1)]
    if done in (0.0, 1.0) or before == after:
        return after if done == 1.0 else before
    old, new = ({thing.shape: thing for thing in state} for state in (before, after))
    return tuple(_half_done(old.get(shape), new.get(shape), done) for shape in sorted({*old, *new}))


def _half_done(old: Thing | None, new: Thing | None, done: float) -> Thing:
    if old is None or new is None:  # grows or shrinks
        thing = new or old
        assert thing is not None
        return replace(thing, radius=thing.radius * (done if old is None else 1 - done))
    (x0, y0), (x1, y1) = old.centre, new.centre
    shown = old if done < 0.5 else new
    x, y = shown.centre
    dx, dy = x0 + (x1 - x0) * done - x, y0 + (y1 - y0) * done - y
    return replace(shown, dx=shown.dx + dx, dy=shown.dy + dy)
