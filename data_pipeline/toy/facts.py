"""Statements about the toy world, in any order: what pretraining says besides captions.

A caption's words follow from the words before them more often than from the picture. Of a fact
(`The circle is top left.`) the end can only be known by looking up what its beginning names.
"""

from __future__ import annotations

import random

from data_pipeline.toy.captions import NUMBERS, absent, past, sentence, single, tell
from data_pipeline.toy.world import PLACES, State, Story


def still_facts(state: State, rng: random.Random, count: int) -> str:
    """Up to `count` facts about a picture, none of them twice."""
    return " ".join(dict.fromkeys(_of_a_state(state, rng) for _ in range(count)))


def story_facts(story: Story, rng: random.Random, count: int) -> str:
    """Up to `count` facts about a clip, none of them twice, most of them about its events."""
    return " ".join(dict.fromkeys(_of_a_story(story, rng) for _ in range(count)))


def _of_a_state(state: State, rng: random.Random) -> str:
    thing = rng.choice(state)
    kind = rng.choice(("colour", "shape", "count", "place", "exists"))
    if kind == "colour":
        return f"The {thing.shape} is {thing.colour}."
    if kind == "shape":
        return f"The {thing.colour} one is a {thing.shape}."
    if kind == "count":
        return f"There {'is' if len(state) == 1 else 'are'} {NUMBERS[len(state)]}."
    if kind == "place":
        return f"The {thing.shape} is {PLACES[thing.place]}."
    if rng.random() < 0.5:
        return f"A {thing.name} is there."
    return f"A {absent(state, rng)} is not there."


def _of_a_story(story: Story, rng: random.Random) -> str:
    kind = rng.choice(("end", "order", "when", "before", "before", "when", "order"))
    alone = single(story)
    if kind == "end":
        fact = _of_a_state(story.states[-1], rng)
        return f"At the end {fact[0].lower()}{fact[1:]}"
    if kind == "when" and alone:
        event = rng.choice(alone)
        return sentence(f"{past(event)} at second {NUMBERS[event.second]}")
    if kind == "before" and len(alone) > 1:
        one, two = rng.sample(alone, 2)
        word = "before" if one.second < two.second else "after"
        return sentence(f"{past(one)} {word} {past(two)}")
    word, event = rng.choice([("first", story.events[0]), ("last", story.events[-1])])
    told = tell(event)
    return f"{sentence(word)[:-1]} {told[0].lower()}{told[1:]}"
