"""Statements about the toy world, in any order: what pretraining says besides captions.

A caption's words follow from the words before them more often than from the picture. Of a fact
(`The circle is red, top left.`) the end can only be known by looking up what its beginning names.
"""

from __future__ import annotations

import random

from data_pipeline.toy.captions import (
    NUMBERS,
    absent,
    by_one,
    narrate_changes,
    past,
    sentence,
    single,
    tell,
)
from data_pipeline.toy.world import PLACES, Event, State, Story, Thing


def still_facts(state: State, rng: random.Random) -> str:
    """A fact about each thing, in any order; what one says gives no other away."""
    return " ".join(_about(thing, state, rng) for thing in rng.sample(state, len(state)))


def _about(thing: Thing, state: State, rng: random.Random) -> str:
    """What a thing is, told from its shape, its colour or its place; or that something is there."""
    kind = rng.choice(("shape", "shape", "colour", "place", "exists"))
    if kind == "shape":
        return f"The {thing.shape} is {thing.colour}, {PLACES[thing.place]}."
    if kind == "colour":
        return f"The {thing.colour} one is a {thing.shape}, {PLACES[thing.place]}."
    if kind == "place":
        return f"{sentence(PLACES[thing.place])[:-1]} is a {thing.name}."
    if rng.random() < 0.5:
        return f"A {by_one(thing, rng)} is there."
    return f"A {absent(state, rng)} is not there."


def timeline(story: Story) -> str:
    """`Second one: nothing new. Second two: the red circle moves right. ...`, every second."""
    changes = enumerate(narrate_changes(story), 1)
    return " ".join(f"Second {NUMBERS[second]}: {_inner(told)}" for second, told in changes)


def story_facts(story: Story, rng: random.Random) -> str:
    """Facts about the events of a clip or its end, each about another shape."""
    state, said, spoken = story.states[-1], [], set()
    if rng.random() < 0.25:
        thing = rng.choice(state)
        spoken.add(thing.shape)
        said.append(f"At the end {_inner(_about(thing, state, rng))}")
    for event in rng.sample(story.events, len(story.events)):
        if event.shape not in spoken:
            spoken.add(event.shape)
            said += _of_event(event, story, rng)
    return " ".join(said) or _ordered("First", story.events[0])


def _of_event(event: Event, story: Story, rng: random.Random) -> list[str]:
    ends = (("First", story.events[0]), ("Last", story.events[-1]))
    facts = [_ordered(word, end) for word, end in ends if end == event]
    if event in single(story) and (not facts or rng.random() < 0.7):
        return [sentence(f"{past(event)} at second {NUMBERS[event.second]}")]
    return [rng.choice(facts)] if facts else []


def _ordered(word: str, event: Event) -> str:
    return f"{word} {_inner(tell(event))}"


def _inner(told: str) -> str:
    return told[0].lower() + told[1:]
