"""Simulates the toy world: coloured shapes on four places come, leave, move and change colour.

A story is one state for each second and the events between them. Captions, questions and answers
are made from these, never from pictures. A picture between two seconds shows a change half done.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 90, 230),
    "yellow": (240, 220, 50),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = {"right": 1, "left": -1, "down": 2, "up": -2}  # what a move adds to a place
EventKind = Literal["come", "leave", "move", "turn"]


@dataclass(frozen=True)
class Thing:
    """A shape. All shapes of a world are different, so `the circle` is never ambiguous."""

    shape: str
    colour: str
    place: int  # index into PLACES
    radius: float  # in units of the picture's side, like dx and dy
    dx: float  # offset from the middle of its place, to the right
    dy: float  # likewise, down

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        """x (to the right) and y (down) in units of the picture's side."""
        return 0.25 + 0.5 * (self.place % 2) + self.dx, 0.25 + 0.5 * (self.place // 2) + self.dy


State = tuple[Thing, ...]  # in order of place


@dataclass(frozen=True)
class Event:
    """A change of one thing."""

    second: int
    kind: EventKind
    who: str  # the thing's name before the change: "red circle"
    to: str = ""  # move: the direction; turn: the new colour

    @property
    def shape(self) -> str:
        return self.who.split()[1]


@dataclass(frozen=True)
class Story:
    """What happens in a clip."""

    states: tuple[State, ...]  # the world at each second, from 0
    events: tuple[Event, ...]  # those of second t lead from state t - 1 to state t

    def at(self, second: int) -> list[Event]:
        """The events of a second."""
        return [event for event in self.events if event.second == second]


def still(seed: int) -> State:
    """The state of a picture, with one to three things."""
    rng = random.Random(seed)
    return _cast(rng, rng.randint(1, 3))


def simulate(seed: int, seconds: int, events: int, gap: int = 1) -> Story:
    """A story with `events` events, at least `gap` seconds apart, determined by its arguments.

    Raises ValueError where so many events do not fit.
    """
    free = seconds - 1 - (events - 1) * (gap - 1)
    if events > free:
        raise ValueError(f"{events} events, {gap} s apart, do not fit into {seconds} seconds")
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(1, free + 1), events))
    times = [second + i * (gap - 1) for i, second in enumerate(chosen)]
    state = _cast(rng, rng.randint(1, 2))
    shapes = [shape for shape in SHAPES if shape not in {thing.shape for thing in state}]
    rng.shuffle(shapes)
    states, happened = [state], []
    for second in range(1, seconds):
        if second in times:
            state, event = _happen(rng, state, shapes, second)
            happened.append(event)
        states.append(state)
    return Story(tuple(states), tuple(happened))


def _cast(rng: random.Random, count: int) -> State:
    """`count` things of different shapes, colours and places."""
    shapes, colours = rng.sample(SHAPES, count), rng.sample(sorted(COLOURS), count)
    places = sorted(rng.sample(range(len(PLACES)), count))
    return tuple(map(lambda *which: make_thing(rng, *which), shapes, colours, places))


def make_thing(rng: random.Random, shape: str, colour: str, place: int) -> Thing:
    """A thing of a random size, near the middle of its place."""
    shift = 0.03
    dx, dy = rng.uniform(-shift, shift), rng.uniform(-shift, shift)
    return Thing(shape, colour, place, rng.uniform(0.19, 0.22), dx, dy)


def _happen(
    rng: random.Random, state: State, shapes: list[str], second: int
) -> tuple[State, Event]:
    """The next state and its event. A new thing gets its shape from `shapes`, those not used."""
    kinds: list[EventKind] = ["move", "move", "turn"]  # places are learned more slowly than colours
    kinds += ["come"] if shapes and len(state) < 3 else []
    kinds += ["leave"] if len(state) > 1 else []
    kind = rng.choice(kinds)
    colours = sorted(set(COLOURS) - {thing.colour for thing in state})
    if kind == "come":
        place = rng.choice([p for p in range(4) if p not in {thing.place for thing in state}])
        new = make_thing(rng, shapes.pop(), rng.choice(colours), place)
        return _ordered([*state, new]), Event(second, "come", new.name)
    if kind == "move":
        thing, direction, place = rng.choice(_moves(state))
        rest = [other for other in state if other != thing]
        moved = _ordered([*rest, replace(thing, place=place)])
        return moved, Event(second, "move", thing.name, direction)
    thing = rng.choice(state)
    rest = [other for other in state if other != thing]
    if kind == "leave":
        return _ordered(rest), Event(second, "leave", thing.name)
    colour = rng.choice(colours)
    turned = _ordered([*rest, replace(thing, colour=colour)])
    return turned, Event(second, "turn", thing.name, colour)


def _ordered(things: list[Thing]) -> State:
    return tuple(sorted(things, key=lambda thing: thing.place))


def _moves(state: State) -> list[tuple[Thing, str, int]]:
    """Every move to a free place: (thing, direction, new place)."""
    occupied = {thing.place for thing in state}
    moves = []
    for thing in state:
        for direction, step in DIRECTIONS.items():
            place = thing.place + step
            same_row = abs(step) == 2 or place // 2 == thing.place // 2
            if 0 <= place < 4 and same_row and place not in occupied:
                moves.append((thing, direction, place))
    return moves
