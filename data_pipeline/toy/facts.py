"""Writes pretraining texts about the toy world, besides captions: statements in any order.

The words of a caption often follow from the words before them, without the picture. The end of a
statement (`The circle is red, top left.`) needs the picture: its beginning names what to look at.

- statements about things (`still_facts`)
- `checklist`: `Circle: yes. Red: no. ...`
- `timeline`: what happens in each second, the seconds in any order
- `tracks`: how the colour or place of each thing changes, second by second
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
    tell,
    yes_or_no,
)
from data_pipeline.toy.world import COLOURS, PLACES, SHAPES, Event, State, Story, Thing


def still_facts(state: State, rng: random.Random) -> str:
    """A statement about each thing, in any order; none can be concluded from another."""
    return " ".join(_about(thing, state, rng) for thing in rng.sample(state, len(state)))


def _about(thing: Thing, state: State, rng: random.Random) -> str:
    """A statement that begins with a thing's shape, colour or place, or says what is there."""
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
    """The text for a picture: a caption or statements, and a checklist, in either order."""
    text = describe_places(state) if rng.random() < 0.3 else still_facts(state, rng)
    return _with_checklist(text, state, rng)


def _with_checklist(text: str, state: State, rng: random.Random) -> str:
    return " ".join(rng.sample((text, checklist(state, rng)), 2))


def of_story(story: Story, rng: random.Random) -> str:
    """The text for a video: its tracks and its timeline, in either order."""
    return " ".join(rng.sample((tracks(story, rng), timeline(story, rng)), 2))


def of_text(state: State, story: Story, rng: random.Random) -> tuple[str, str]:
    """(prompt, target) of a text sample: a scene or a story, and statements about it.

    The target of a scene begins with its things again, in another order: with statements alone the
    model had not learned after 25,000 samples to look up a thing's colour, shape and place in the
    text. The repetition teaches it to look up what followed a word before.
    """
    if rng.random() < 0.6:
        again = describe_places(tuple(rng.sample(state, len(state))))
        facts = _with_checklist(still_facts(state, rng), state, rng)
        return f"{describe_places(state)} ", f"{again} {facts}"
    texts = [_ordered(word, end) for word, end in rng.sample(ends(story), 2)]
    return f"{narrate(story)} ", " ".join(rng.sample([*texts, _compared(story, rng)], 3))


def _compared(story: Story, rng: random.Random) -> str:
    """The order of two events that follow each other: `The red circle left before the blue square
    came.`, or the same with `after`."""
    place = rng.randrange(len(story.events) - 1)
    sooner, later = map(past, story.events[place : place + 2])  # neighbours are never the same
    if rng.random() < 0.5:
        return sentence(f"{sooner} before {later}")
    return sentence(f"{later} after {sooner}")


def checklist(state: State, rng: random.Random) -> str:
    """`Circle: yes. Red: no. ...`: whether each of six shapes and colours is there.

    Without it the model learns what is there last, from questions with one word to learn from.
    """
    there = {thing.shape for thing in state} | {thing.colour for thing in state}
    names = rng.sample([*SHAPES, *COLOURS], 6)
    return " ".join(f"{name.capitalize()}: {yes_or_no(name in there)}." for name in names)


def tracks(story: Story, rng: random.Random) -> str:
    """`Colours of the circle: red, red, blue, gone. Places of the cross: ...`, in any order.

    A thing has a track of its colours where they change or it is not always there, and a track of
    its places where they change.
    """
    texts = []
    for shape in SHAPES:
        seen = [_find(state, shape) for state in story.states]
        looks = {
            "Colours": [thing.colour if thing else "gone" for thing in seen],
            "Places": [PLACES[thing.place] if thing else "gone" for thing in seen],
        }
        texts += [
            f"{what} of the {shape}: {', '.join(values)}."
            for what, values in looks.items()
            if len({*values} - {"gone"} if what == "Places" else {*values}) > 1
        ]
    rng.shuffle(texts)
    return " ".join(texts)


def _find(state: State, shape: str) -> Thing | None:
    return next((thing for thing in state if thing.shape == shape), None)


def timeline(story: Story, rng: random.Random) -> str:
    """`Second two: the red circle moves right. Second one: nothing new. ...`: all seconds.

    They are shuffled: in order, each would follow from the text before it, without the video.
    """
    changes = list(enumerate(narrate_changes(story), 1))
    rng.shuffle(changes)
    return " ".join(f"Second {NUMBERS[second]}: {_lower_first(text)}" for second, text in changes)


def _ordered(word: str, event: Event) -> str:
    return f"{word.capitalize()} {_lower_first(tell(event))}"


def _lower_first(text: str) -> str:
    return text[0].lower() + text[1:]
