"""Words for the toy world: captions, and questions with their answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.toy.world import (
    COLOURS,
    DIRECTIONS,
    PLACES,
    SHAPES,
    Event,
    State,
    Story,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PRESENT = {"come": "comes", "leave": "leaves", "move": "moves", "turn": "turns"}
_PAST = {"come": "came", "leave": "left", "move": "moved", "turn": "turned"}


@dataclass(frozen=True)
class QA:
    """A question; `options` are all its possible answers, none where it asks for a sentence."""

    task: str
    question: str
    answer: str
    options: tuple[str, ...] = ()


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def describe(state: State) -> str:
    """`A red circle and a blue square.`, in order of place."""
    return _listed([f"a {thing.name}" for thing in state])


def describe_places(state: State) -> str:
    """`A red circle top left and a blue square bottom right.`"""
    return _listed([f"a {thing.name} {PLACES[thing.place]}" for thing in state])


def _listed(names: list[str]) -> str:
    last = names[-1] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return sentence(last)


def tell(event: Event) -> str:
    """`The red circle turns blue.`"""
    return sentence(_clause(event, _PRESENT))


def past(event: Event) -> str:
    """`the red circle turned blue`"""
    return _clause(event, _PAST)


def _clause(event: Event, tense: dict[str, str]) -> str:
    article = "a" if event.kind == "come" else "the"
    return f"{article} {event.who} {tense[event.kind]} {event.to}".rstrip()


def narrate(story: Story) -> str:
    """The first state, then every event in order."""
    return " ".join([describe(story.states[0]), *map(tell, story.events)])


def narrate_order(story: Story) -> str:
    """As `narrate`, and which of the first and the last event came before the other."""
    first, last = story.events[0], story.events[-1]
    order = sentence(f"{past(first)} before {past(last)}")
    return f"{narrate(story)} {order}"


def _closed(task: str, question: str, answer: str, options: Sequence[str]) -> QA:
    return QA(task, question, sentence(answer), tuple(map(sentence, options)))


def colour(state: State, rng: random.Random, when: str = "") -> QA:
    thing = rng.choice(state)
    return _closed("colour", f"What colour is the {thing.shape}{when}?", thing.colour, [*COLOURS])


def shape(state: State, rng: random.Random, when: str = "") -> QA:
    thing = rng.choice(state)
    return _closed("shape", f"Which shape is {thing.colour}{when}?", thing.shape, SHAPES)


def count(state: State, rng: random.Random, when: str = "") -> QA:
    return _closed("count", f"How many shapes are there{when}?", NUMBERS[len(state)], NUMBERS[1:4])


def place(state: State, rng: random.Random, when: str = "") -> QA:
    thing = rng.choice(state)
    return _closed("place", f"Where is the {thing.shape}{when}?", PLACES[thing.place], PLACES)


def exists(state: State, rng: random.Random, when: str = "") -> QA:
    """Yes or no, equally often; of a no, one of colour and shape is there or neither."""
    yes = rng.random() < 0.5
    name = rng.choice(state).name if yes else absent(state, rng)
    return _closed("exists", f"Is there a {name}{when}?", "yes" if yes else "no", ("yes", "no"))


def absent(state: State, rng: random.Random) -> str:
    """The name of what is not there, though its colour or its shape may be."""
    thing = rng.choice(state)
    names = [f"{colour} {thing.shape}" for colour in COLOURS]
    names += [f"{thing.colour} {shape}" for shape in SHAPES]
    there = {thing.name for thing in state}
    return rng.choice([name for name in names if name not in there])


OF_A_STATE = (colour, shape, count, place, exists)


def first_or_last(story: Story, rng: random.Random) -> QA:
    word, event = rng.choice([("first", story.events[0]), ("last", story.events[-1])])
    return QA("order", f"What happens {word}?", tell(event))


def single(story: Story) -> list[Event]:
    """The events that are alone in what they say: a shape may move right, left and right."""
    told = [past(event) for event in story.events]
    return [event for event in story.events if told.count(past(event)) == 1]


def before(story: Story, rng: random.Random) -> QA | None:
    """Did one event come before another? Yes or no, equally often; None with too few events."""
    if len(single(story)) < 2:
        return None
    one, two = rng.sample(single(story), 2)
    told = f"{past(one)} before {past(two)}"
    answer = "yes" if one.second < two.second else "no"
    return _closed("before", f"Is it true that {told}?", answer, ("yes", "no"))


def when(story: Story, rng: random.Random) -> QA | None:
    """The second of an event; None where every event has a double."""
    if not single(story):
        return None
    event = rng.choice(single(story))
    options = [f"at second {NUMBERS[second]}" for second in range(1, len(story.states))]
    question = f"When was it that {past(event)}?"
    return _closed("when", question, options[event.second - 1], options)


def direction(story: Story, rng: random.Random) -> QA | None:
    """Which way a shape that moves exactly once does so; None where there is none."""
    moves = [event for event in story.events if event.kind == "move"]
    shapes = [event.shape for event in moves]
    once = [event for event in moves if shapes.count(event.shape) == 1]
    if not once:
        return None
    event = rng.choice(once)
    return _closed("direction", f"Which way does the {event.shape} move?", event.to, [*DIRECTIONS])


def ask_still(state: State, rng: random.Random) -> QA:
    return rng.choice(OF_A_STATE)(state, rng)


def ask_story(story: Story, rng: random.Random) -> QA:
    """A question about the clip whose answer follows from its states and events."""
    if rng.random() < 0.2:
        return rng.choice(OF_A_STATE)(story.states[-1], rng, " at the end")
    ask = rng.choice((first_or_last, before, when, direction))
    return ask(story, rng) or first_or_last(story, rng)


def ask_text(state: State, story: Story, rng: random.Random) -> tuple[str, QA]:
    """Words that tell the scene, or the story, and a question that needs no picture."""
    if rng.random() < 0.5:
        return describe(state), rng.choice((colour, shape, count, exists))(state, rng)
    asked = rng.choice((first_or_last, before))(story, rng)
    return narrate(story), asked or first_or_last(story, rng)
