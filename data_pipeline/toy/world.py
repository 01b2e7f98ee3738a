"""A small exact world: shapes move in a box, appear, leave, change colour and collide.

Positions are pixels (x right, y down), times are frame numbers. The simulation is the ground
truth: captions and answers are read from its events, never from pictures.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Literal

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 90, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "orange": (250, 140, 30),
    "white": (245, 245, 245),
}
EventKind = Literal["appear", "leave", "change", "collide"]


@dataclass
class Thing:
    """One shape. Shapes within a world differ, so `the circle` is never ambiguous."""

    shape: str
    colour: str
    x: float
    y: float
    vx: float  # pixels a frame
    vy: float
    radius: float
    present: bool = True
    leaving: bool = False  # walks out: walls no longer hold it

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Event:
    """What happened at a frame; the names are those before the event."""

    frame: int
    kind: EventKind
    who: str  # "red circle"
    other: str = ""  # collide: the second thing; change: the new colour


@dataclass
class Story:
    """The states of all things at every frame, and the events between them in order."""

    size: int
    fps: int
    frames: list[list[Thing]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


@dataclass(frozen=True)
class _Cue:
    frame: int
    kind: EventKind
    index: int


def simulate(seed: int, size: int = 64, fps: int = 8, frames: int = 40) -> Story:
    """Plays one world; the same arguments give the same story."""
    rng = random.Random(seed)
    things = _cast(rng, size, rng.randint(2, 3))
    cues = _cues(rng, things, frames)
    story = Story(size=size, fps=fps)
    touching: set[tuple[int, int]] = set()
    for frame in range(frames):
        for cue in cues:
            if cue.frame == frame:
                _play(cue, things, story, rng)
        if frame:
            _move(things, story, frame)
        _collide(things, story, frame, touching)
        story.frames.append([replace(thing) for thing in things])
    return story


def still(seed: int, size: int = 64) -> list[Thing]:
    """One to four things that do not overlap, for a picture."""
    rng = random.Random(seed)
    return _cast(rng, size, rng.randint(1, 4))


def _cast(rng: random.Random, size: int, count: int) -> list[Thing]:
    things: list[Thing] = []
    shapes = rng.sample(SHAPES, count)
    colours = rng.sample(sorted(COLOURS), count)
    for shape, colour in zip(shapes, colours, strict=True):
        radius = rng.uniform(0.1, 0.14) * size
        x, y = _free_place(rng, things, size, radius)
        angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.012, 0.03) * size
        velocity = speed * math.cos(angle), speed * math.sin(angle)
        things.append(Thing(shape, colour, x, y, *velocity, radius))
    return things


def _free_place(
    rng: random.Random, things: list[Thing], size: int, radius: float
) -> tuple[float, float]:
    """A place that overlaps nothing; the least bad of 50 where the box is crowded."""
    places = []
    for _ in range(50):
        x, y = (rng.uniform(radius, size - radius) for _ in range(2))
        gaps = [math.hypot(x - t.x, y - t.y) - t.radius - radius for t in things if t.present]
        places.append((min(gaps, default=size), x, y))
        if places[-1][0] > 1:
            break
    _, x, y = max(places)
    return x, y


def _cues(rng: random.Random, things: list[Thing], frames: int) -> list[_Cue]:
    """At most one scripted event a thing: it appears late, changes colour, or walks out."""
    cues = []
    for index in range(len(things)):
        kind: EventKind | None = rng.choice(("appear", "change", "leave", None))
        if kind is None or (kind == "appear" and index == 0):
            continue
        cues.append(_Cue(rng.randrange(frames // 6, frames // 2), kind, index))
        things[index].present = kind != "appear"
    return cues


def _play(cue: _Cue, things: list[Thing], story: Story, rng: random.Random) -> None:
    thing = things[cue.index]
    if cue.kind == "appear":
        thing.x, thing.y = _free_place(rng, things, story.size, thing.radius)
        thing.present = True
        story.events.append(Event(cue.frame, "appear", thing.name))
    elif cue.kind == "change":
        colours = sorted(set(COLOURS) - {other.colour for other in things})
        colour = rng.choice(colours)
        story.events.append(Event(cue.frame, "change", thing.name, colour))
        thing.colour = colour
    else:  # "leave": heads for the nearest wall; the event comes when it is out of sight
        thing.leaving = True
        speed = 0.05 * story.size
        left, top = thing.x < story.size / 2, thing.y < story.size / 2
        if abs(thing.x - story.size / 2) > abs(thing.y - story.size / 2):
            thing.vx, thing.vy = (-speed if left else speed), 0.0
        else:
            thing.vx, thing.vy = 0.0, (-speed if top else speed)


def _move(things: list[Thing], story: Story, frame: int) -> None:
    for thing in things:
        if not thing.present:
            continue
        thing.x += thing.vx
        thing.y += thing.vy
        if thing.leaving:
            inside = all(-thing.radius < p < story.size + thing.radius for p in (thing.x, thing.y))
            if not inside:
                thing.present = False
                story.events.append(Event(frame, "leave", thing.name))
            continue
        low, high = thing.radius, story.size - thing.radius
        if not low <= thing.x <= high:
            thing.vx = math.copysign(thing.vx, low - thing.x if thing.x < low else high - thing.x)
            thing.x = min(max(thing.x, low), high)
        if not low <= thing.y <= high:
            thing.vy = math.copysign(thing.vy, low - thing.y if thing.y < low else high - thing.y)
            thing.y = min(max(thing.y, low), high)


def _collide(things: list[Thing], story: Story, frame: int, touching: set[tuple[int, int]]) -> None:
    """Equal masses exchange their speeds along the line between them. Things walking out pass."""
    for i, a in enumerate(things):
        for j in range(i + 1, len(things)):
            b = things[j]
            distance = math.hypot(b.x - a.x, b.y - a.y)
            solid = a.present and b.present and not a.leaving and not b.leaving
            if not solid or distance >= a.radius + b.radius:
                touching.discard((i, j))
                continue
            nx, ny = (b.x - a.x) / (distance or 1), (b.y - a.y) / (distance or 1)
            closing = (a.vx - b.vx) * nx + (a.vy - b.vy) * ny
            if closing > 0:
                a.vx, a.vy = a.vx - closing * nx, a.vy - closing * ny
                b.vx, b.vy = b.vx + closing * nx, b.vy + closing * ny
                if (i, j) not in touching:
                    story.events.append(Event(frame, "collide", a.name, b.name))
            touching.add((i, j))
