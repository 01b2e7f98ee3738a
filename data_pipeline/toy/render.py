"""Renders the toy world as real files: JPEG pictures, H.264 videos.

A frame shows the state of its moment and nothing else: no trace of what was before, and always the
same background. Only comparing frames shows what has happened, and when.
"""

from __future__ import annotations

import io
from dataclasses import replace

import av
import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.h264 import h264_stream
from data_pipeline.toy.world import COLOURS, State, Story, Thing

BACKGROUND = (20, 20, 24)
_SCALE = 2  # drawn larger and reduced, for smooth edges
_START, _END = 0.25, 0.75  # when, within a second, a change begins to show and when it is done


def draw(state: State, size: int) -> Image.Image:
    """An RGB picture of size x size pixels."""
    side = size * _SCALE
    picture = Image.new("RGB", (side, side), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for thing in state:
        _draw_thing(pen, thing, side)
    return picture.reduce(_SCALE)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
    x, y = (side * part for part in thing.centre)
    r, colour = side * thing.radius, COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif thing.shape == "square":
        half = 0.85 * r
        pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif thing.shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=colour)
    else:
        arm = 0.35 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)


def jpeg(state: State, size: int) -> bytes:
    """The picture of `draw` as a JPEG file."""
    out = io.BytesIO()
    draw(state, size).save(out, "JPEG", quality=92)
    return out.getvalue()


def mp4(story: Story, size: int, fps: int, clock: bool = False) -> bytes:
    """The story as H.264 in an MP4 with `fps` frames a second, `len(story.states)` seconds long.

    clock: a bar at the lower edge grows each second, which tells equal frames apart.
    """
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = h264_stream(container, fps, (size, size), "ultrafast")
        shown: tuple[State, int] | None = None
        for frame in range(len(story.states) * fps):
            now = between(story, frame / fps), frame // fps * clock
            if now != shown:
                shown, pixels = now, np.array(draw(now[0], size))
                if clock:
                    pixels[-3:, : 2 + 4 * now[1]] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def between(story: Story, time: float) -> State:
    """The state to draw at `time` seconds; from the last state's second on, the last state.

    At a whole second it is that second's state; between two seconds a change is shown half done.
    """
    second = min(int(time), len(story.states) - 1)
    done = min(max((time - second - _START) / (_END - _START), 0.0), 1.0)
    before, after = story.states[second], story.states[min(second + 1, len(story.states) - 1)]
    if done in (0.0, 1.0) or before == after:
        return after if done == 1.0 else before
    old, new = ({thing.shape: thing for thing in state} for state in (before, after))
    return tuple(_half_done(old.get(shape), new.get(shape), done) for shape in sorted({*old, *new}))


def _half_done(old: Thing | None, new: Thing | None, done: float) -> Thing:
    """A thing between two states, of which a share `done` (0..1) of the change has happened."""
    if old is None or new is None:  # grows or shrinks
        thing = new or old
        assert thing is not None
        return replace(thing, radius=thing.radius * (done if old is None else 1 - done))
    (x0, y0), (x1, y1) = old.centre, new.centre
    shown = old if done < 0.5 else new
    x, y = shown.centre
    dx, dy = x0 + (x1 - x0) * done - x, y0 + (y1 - y0) * done - y
    return replace(shown, dx=shown.dx + dx, dy=shown.dy + dy)
