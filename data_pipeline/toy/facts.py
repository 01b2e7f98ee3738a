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
    describe_places,
    ends,
    narrate,
    narrate_changes,
    past,
    sentence,
    single,
    tell,
    topics,
    yes_or_no,
)
from data_pipeline.toy.world import COLOURS, PLACES, SHAPES, Event, State, Story, Thing


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


def of_still(state: State, rng: random.Random) -> str:
    """A caption or facts, and a checklist, in any order."""
    told = describe_places(state) if rng.random() < 0.3 else still_facts(state, rng)
    return _and_checklist(told, state, rng)


def _and_checklist(told: str, state: State, rng: random.Random) -> str:
    return " ".join(rng.sample((told, checklist(state, rng)), 2))


def of_story(story: Story, rng: random.Random) -> str:
    """Two ways to tell what happens, flags among them more often than not."""
    said = rng.sample((story_facts(story, rng), timeline(story, rng), track(story, rng)), 2)
    if rng.random() < 0.67:
        said[0] = flags(story, rng)
    rng.shuffle(said)
    return " ".join(said)


def of_text(state: State, story: Story, rng: random.Random) -> tuple[str, str]:
    """Words that tell a scene or a story; the scene's things again in another order, and facts.

    From facts alone a thing's colour, shape and place are not looked up in a text after 25,000
    samples. What was said already is the shortest way to learn to look up what followed a word.
    """
    if rng.random() < 0.6:
        again = describe_places(tuple(rng.sample(state, len(state))))
        facts = _and_checklist(still_facts(state, rng), state, rng)
        return f"{describe_places(state)} ", f"{again} {facts}"
    told = [_ordered(word, end) for word, end in rng.sample(ends(story), 2)]
    return f"{narrate(story)} ", " ".join(rng.sample([*told, _compared(story, rng)], 3))


def _compared(story: Story, rng: random.Random) -> str:
    """`The red circle left before the blue square came.`, or the later after the sooner."""
    place = rng.randrange(len(story.events) - 1)
    sooner, later = map(past, story.events[place : place + 2])  # neighbours are never the same
    if rng.random() < 0.5:
        return sentence(f"{sooner} before {later}")
    return sentence(f"{later} after {sooner}")


def checklist(state: State, rng: random.Random) -> str:
    """`Circle: yes. Red: no. ...`: six of all shapes and colours, there or not.

    Whether something is there is learned last: of a question a sample shows one word.
    """
    there = {thing.shape for thing in state} | {thing.colour for thing in state}
    names = rng.sample([*SHAPES, *COLOURS], 6)
    return " ".join(f"{name.capitalize()}: {yes_or_no(name in there)}." for name in names)


def flags(story: Story, rng: random.Random) -> str:
    """`The red circle moved right: no, yes, no. ...`: whether an event fell on each second."""
    said = []
    for event in rng.sample(story.events, len(story.events)):
        same = [other.second for other in story.events if past(other) == past(event)]
        told = ", ".join(yes_or_no(second in same) for second in range(1, len(story.states)))
        said.append(f"{sentence(past(event))[:-1]}: {told}.")
    return " ".join(dict.fromkeys(said))


def track(story: Story, rng: random.Random) -> str:
    """`Circle: red top left, red top left, red top right, gone.`: one thing in every second."""
    shape = rng.choice(story.events).shape
    shown = []
    for state in story.states:
        thing = next((thing for thing in state if thing.shape == shape), None)
        shown.append(f"{thing.colour} {PLACES[thing.place]}" if thing else "gone")
    return f"{shape.capitalize()}: {', '.join(shown)}."


def timeline(story: Story, rng: random.Random) -> str:
    """`Second two: the red circle moves right. Second one: nothing new. ...`, every second, in any
    order: in order each would be told by what was told before, and no second would be looked up.
    """
    changes = list(enumerate(narrate_changes(story), 1))
    rng.shuffle(changes)
    return " ".join(f"Second {NUMBERS[second]}: {_inner(told)}" for second, told in changes)


def story_facts(story: Story, rng: random.Random) -> str:
    """Facts about the events of a clip or its end, each about another shape."""
    said = []
    for topic in topics(story, rng):
        if isinstance(topic, Thing):
            said.append(f"At the end {_inner(_about(topic, story.states[-1], rng))}")
        else:
            said += _of_event(topic, story, rng)
    return " ".join(said) or _ordered("first", story.events[0])


def _of_event(event: Event, story: Story, rng: random.Random) -> list[str]:
    facts = [_ordered(word, end) for word, end in ends(story) if end == event]
    if event in single(story) and (not facts or rng.random() < 0.7):
        return [sentence(f"{past(event)} at second {NUMBERS[event.second]}")]
    return [rng.choice(facts)] if facts else []


def _ordered(word: str, event: Event) -> str:
    return f"{word.capitalize()} {_inner(tell(event))}"


def _inner(told: str) -> str:
    return told[0].lower() + told[1:]
