"""Clips and questions that need time: no frame answers them, nor do all frames in another order.

A thing looks in one of two ways in each second: it has one of two colours, stands in one of two
places, or is one of two shapes. The order of the two is drawn from a pattern, such that a clip of
the same frames in another order, with another answer, is as likely; and such that the frame in
the middle goes with every answer alike:

- a change once (`before`, `first`, `direction`): `abbb` or `aaab`, and which look is `a`. A clip
  played backwards has the other answer. The third frame shows either look as often.
- looks that last equally long in all (`repeats`, `duration`): `aabb`, `abba`, `abab`.

An answer says what is seen in each second, then, as its last sentence, what was asked:
`Yellow, red, yellow, red. Three.` Single words are not learned by a small model within thousands of
steps: such a word leaves open which of the frames it follows from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from data_pipeline.toy.captions import NUMBERS, QA, sentence
from data_pipeline.toy.world import COLOURS, PLACES, SHAPES, Story, Thing, make_thing

GROUP = "time"  # of these tasks, which are also scored together
TASKS = ("before", "first", "direction", "repeats", "duration")
SECONDS = 4
_ONCE = ("abbb", "aaab")
_BY_CHANGES = ("aabb", "abba", "abab")
_BY_LENGTH = {"one": ("abba", "abab"), "two": ("aabb",)}
# Rows and columns. What moves stays in its lane, what else is there has the other one.
_LANES = (((0, 1), (2, 3)), ((0, 2), (1, 3)))


@dataclass(frozen=True)
class Clip:
    """A story of four seconds, and questions about different things in it, one at least."""

    story: Story
    asked: tuple[QA, ...]


@dataclass
class _Draw:
    """What is left to draw from for the things of a clip."""

    rng: random.Random
    shapes: list[str]
    colours: list[str]
    lanes: list[tuple[int, int]]


def draw(rng: random.Random) -> Clip:
    """A clip whose first question is of each of TASKS equally often.

    In half of the clips a second thing changes too. It does so once, which tells nothing about the
    order in which the first one changed.
    """
    axis = rng.choice(_LANES)
    left = _Draw(rng, rng.sample(SHAPES, 4), rng.sample(sorted(COLOURS), 4), rng.sample(axis, 2))
    asked = [rng.choice(TASKS)]
    asked += [rng.choice(("before", "direction"))] if rng.random() < 0.5 else []
    made = [_OF[task](left) for task in asked]
    seconds = zip(*(things for things, _ in made), strict=True)
    states = tuple(tuple(sorted(state, key=lambda thing: thing.place)) for state in seconds)
    return Clip(Story(states, ()), tuple(qa for _, qa in made))


_Made = tuple[list[Thing], QA]  # a thing in each second, and a question about it


def _thing(left: _Draw) -> Thing:
    return make_thing(
        left.rng, left.shapes.pop(), left.colours.pop(), left.rng.choice(left.lanes[-1])
    )


def _ordered(left: _Draw, looks: Sequence[Thing], patterns: Sequence[str]) -> list[Thing]:
    """A thing in each second; either of the two looks may be the first."""
    a, b = left.rng.sample(looks, 2)
    return [a if letter == "a" else b for letter in left.rng.choice(patterns)]


def _turning(left: _Draw, patterns: Sequence[str]) -> list[Thing]:
    """A thing of two colours."""
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
    return things, _told("before", question, seen, answer, (one, other))


def _first(left: _Draw) -> _Made:
    looks = _thing(left), _thing(left)
    left.lanes.pop()
    things = _ordered(left, looks, _ONCE)
    seen = [thing.shape for thing in things]
    one, other = left.rng.sample((seen[0], seen[-1]), 2)
    question = f"Which is there first, the {one} or the {other}?"
    return things, _told("first", question, seen, seen[0], (one, other))


def _direction(left: _Draw) -> _Made:
    thing, lane = _thing(left), left.lanes.pop()
    things = _ordered(left, [replace(thing, place=place) for place in lane], _ONCE)
    row = lane[1] - lane[0] == 1
    seen = [PLACES[thing.place].split()[row] for thing in things]
    ways = ("left", "right") if row else ("up", "down")
    answer = ways[things[-1].place == lane[1]]
    one, other = left.rng.sample(ways, 2)
    question = f"Which way does the {thing.shape} move, {one} or {other}?"
    return things, _told("direction", question, seen, answer, (one, other))


def _repeats(left: _Draw) -> _Made:
    changes = left.rng.randrange(len(_BY_CHANGES))
    things = _turning(left, _BY_CHANGES[changes : changes + 1])
    question = f"How often does the {things[0].shape} change its colour?"
    seen = [thing.colour for thing in things]
    return things, _told("repeats", question, seen, NUMBERS[changes + 1], NUMBERS[1:4])


def _duration(left: _Draw) -> _Made:
    length = left.rng.choice(sorted(_BY_LENGTH))
    things = _turning(left, _BY_LENGTH[length])
    question = f"How many seconds does the {things[0].shape} keep its first colour?"
    seen = [thing.colour for thing in things]
    return things, _told("duration", question, seen, length, tuple(_BY_LENGTH))


_OF: dict[str, Callable[[_Draw], _Made]] = {
    "before": _before,
    "first": _first,
    "direction": _direction,
    "repeats": _repeats,
    "duration": _duration,
}


def _told(task: str, question: str, seen: Sequence[str], answer: str, options: Sequence[str]) -> QA:
    """The answer in two sentences: what is seen in each second, and what was asked."""
    told = f"{sentence(', '.join(seen))} {sentence(answer)}"
    return QA(f"{GROUP}/{task}", question, told, tuple(map(sentence, options)))
