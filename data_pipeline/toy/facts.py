"""Statements about the toy world, in any order: what pretraining says besides captions.

A caption's words follow from the words before them more often than from the picture. Of a fact
(`The circle is top left.`) the end can only be known by looking up what its beginning names.
"""

from __future__ import annotations

import random

from data_pipeline.toy.captions import NUMBERS, absent, past, sentence, single, tell
from data_pipeline.toy.world import PLACES, State, Story, Thing


def still_facts(state: State, rng: random.Random) -> str:
    """One fact about each thing, and none that another one gives away."""
    return " ".join(_about(thing, state, rng) for thing in rng.sample(state, len(state)))


def _about(thing: Thing, state: State, rng: random.Random) -> str:
    kind = rng.choice(("colour", "shape", "place", "exists"))
    if kind == "colour":
        return f"The {thing.shape} is {thing.colour}."
    if kind == "shape":
        return f"The {thing.colour} one is a {thing.shape}."
    if kind == "place":
        return f"The {thing.shape} is placed {PLACES[thing.place]}."
    if rng.random() < 0.5:
        return f"A {thing.name} is there."
    return f"A {absent(state, rng)} is not there."


def story_fact(story: Story, rng: random.Random) -> str:
    """A fact about the events of a clip, or its end."""
    kind = rng.choice(("end", "order", "order", "when", "when", "before", "before"))
    alone = single(story)
    if kind == "end":
        fact = _about(rng.choice(story.states[-1]), story.states[-1], rng)
        return f"At the end {fact[0].lower()}{fact[1:]}"
    if kind == "when" and alone:
        event = rng.choice(alone)
        return sentence(f"{past(event)} at second {NUMBERS[event.second]}")
    if kind == "before" and len(alone) > 1:
        one, two = rng.sample(alone, 2)
        word = "before" if one.second < two.second else "after"
        return sentence(f"{past(one)} {word} {past(two)}")
    word, event = rng.choice([("First", story.events[0]), ("Last", story.events[-1])])
    told = tell(event)
    return f"{word} {told[0].lower()}{told[1:]}"
