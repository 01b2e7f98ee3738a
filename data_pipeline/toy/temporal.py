"""Draws clips and questions that only the order of the frames answers: no single frame does, nor
do all frames in another order.

In each second a thing has one of two looks: two colours, two places or two shapes. A pattern says
in which order. Patterns are such that a clip of the same frames in another order, with another
answer, is equally likely, and that the middle frame says nothing about the answer:

- one change (`before`, `first`, `direction`): `abbb` or `aaab`; either look may be `a`. A clip
  played backwards has the other answer. The third frame shows either look equally often.
- both looks equally long in all (`repeats`, `duration`): `aabb`, `abba`, `abab`.

An answer names the look in each second; its last sentence answers the question:
`Yellow, red, yellow, red. Three.` A small model does not learn single words as answers within
thousands of steps: a single word leaves open which of the frames it follows from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from data_pipeline.toy.captions import NUMBERS, QA, sentence
from data_pipeline.toy.world import COLOURS, PLACES, SHAPES, Story, Thing, make_thing

GROUP = "time"  # name of these tasks together, as which they are also scored
TASKS = ("before", "first", "direction", "repeats", "duration")
SECONDS = 4
_ONCE = ("abbb", "aaab")
_BY_CHANGES = ("aabb", "abba", "abab")
_BY_LENGTH = {"one": ("abba", "abab"), "two": ("aabb",)}
# Rows and columns: a thing that moves stays in its lane, another thing has the other lane.
_LANES = (((0, 1), (2, 3)), ((0, 2), (1, 3)))


@dataclass(frozen=True)
class Clip:
    """A story of four seconds, and one or two questions about different things in it."""

    story: Story
    questions: tuple[QA, ...]


@dataclass
class _Draw:
    """Shapes, colours and lanes that the things of a clip have not used yet."""

    rng: random.Random
    shapes: list[str]
    colours: list[str]
    lanes: list[tuple[int, int]]


def draw(rng: random.Random) -> Clip:
    """A clip; its first question is drawn from TASKS.

    In half of the clips a second thing changes, too. It changes once, which says nothing about how
    the first one changes.
    """
    axis = rng.choice(_LANES)
    left = _Draw(rng, rng.sample(SHAPES, 4), rng.sample(sorted(COLOURS), 4), rng.sample(axis, 2))
    tasks = [rng.choice(TASKS)]
    tasks += [rng.choice(("before", "direction"))] if rng.random() < 0.5 else []
    made = [_MAKERS[task](left) for task in tasks]
    seconds = zip(*(things for things, _ in made), strict=True)
    states = tuple(tuple(sorted(state, key=lambda thing: thing.place)) for state in seconds)
    return Clip(Story(states, ()), tuple(qa for _, qa in made))


_Made = tuple[list[Thing], QA]  # a thing in each second, and a question about it


def _thing(left: _Draw) -> Thing:
    """A thing of an unused shape and colour, in the last of the lanes left."""
    return make_thing(
        left.rng, left.shapes.pop(), left.colours.pop(), left.rng.choice(left.lanes[-1])
    )


def _ordered(left: _Draw, looks: Sequence[Thing], patterns: Sequence[str]) -> list[Thing]:
    """The thing's look in each second, by one of the patterns; either look may be `a`."""
    a, b = left.rng.sample(looks, 2)
    return [a if letter == "a" else b for letter in left.rng.choice(patterns)]


def _turning(left: _Draw, patterns: Sequence[str]) -> list[Thing]:
    """A thing in each second, which has one of two colours."""
    thing = _thing(left)
    other = replace(thing, colour=left.colours.pop())
    left.lanes.pop()
    return _ordered(left, (thing, other), patterns)


def _before(left: _Draw) -> _Made:
    things = _turning(left, _ONCE)
    seen = [thing.colour for thing in things]
    one, other = left.rng.sample((seen[0], seen[-1]), 2)
    word = left.rng.choice(("before", "after"))
    question = f"Which colour does the {things[0].shape} have {word} the other, {one} or {other}?"
    answer = seen[0] if word == "before" else seen[-1]
    return things, _question("before", question, seen, answer, (one, other))


def _first(left: _Draw) -> _Made:
    looks = _thing(left), _thing(left)
    left.lanes.pop()
    things = _ordered(left, looks, _ONCE)
    seen = [thing.shape for thing in things]
    one, other = left.rng.sample((seen[0], seen[-1]), 2)
    question = f"Which is there first, the {one} or the {other}?"
    return things, _question("first", question, seen, seen[0], (one, other))


def _direction(left: _Draw) -> _Made:
    thing, lane = _thing(left), left.lanes.pop()
    things = _ordered(left, [replace(thing, place=place) for place in lane], _ONCE)
    row = lane[1] - lane[0] == 1
    seen = [PLACES[thing.place].split()[row] for thing in things]
    ways = ("left", "right") if row else ("up", "down")
    answer = ways[things[-1].place == lane[1]]
    one, other = left.rng.sample(ways, 2)
    question = f"Which way does the {thing.shape} move, {one} or {other}?"
    return things, _question("direction", question, seen, answer, (one, other))


def _repeats(left: _Draw) -> _Made:
    changes = left.rng.randrange(len(_BY_CHANGES))
    things = _turning(left, _BY_CHANGES[changes : changes + 1])
    question = f"How often does the {things[0].shape} change its colour?"
    seen = [thing.colour for thing in things]
    return things, _question("repeats", question, seen, NUMBERS[changes + 1], NUMBERS[1:4])


def _duration(left: _Draw) -> _Made:
    length = left.rng.choice(sorted(_BY_LENGTH))
    things = _turning(left, _BY_LENGTH[length])
    question = f"How many seconds does the {things[0].shape} keep its first colour?"
    seen = [thing.colour for thing in things]
    return things, _question("duration", question, seen, length, tuple(_BY_LENGTH))


_MAKERS: dict[str, Callable[[_Draw], _Made]] = {
    "before": _before,
    "first": _first,
    "direction": _direction,
    "repeats": _repeats,
    "duration": _duration,
}


def _question(
    task: str, question: str, seen: Sequence[str], answer: str, options: Sequence[str]
) -> QA:
    """A question whose answer has two sentences: the look in each second, and `answer`."""
    full = f"{sentence(', '.join(seen))} {sentence(answer)}"
    return QA(f"{GROUP}/{task}", question, full, tuple(map(sentence, options)))
