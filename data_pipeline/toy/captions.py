"""Describes the toy world in words: captions, and questions with their answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.toy.world import (
    COLOURS,
    PLACES,
    SHAPES,
    Event,
    State,
    Story,
    Thing,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_PRESENT = {"come": "comes", "leave": "leaves", "move": "moves", "turn": "turns"}
_PAST = {"come": "came", "leave": "left", "move": "moved", "turn": "turned"}


@dataclass(frozen=True)
class QA:
    """A question and its answer."""

    task: str
    question: str
    answer: str
    options: tuple[str, ...] = ()  # all possible answers; none where it asks for a sentence


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    return text[0].upper() + text[1:] + "."


def describe(state: State) -> str:
    """A caption of a state: `A red circle and a blue square.`, in order of place."""
    return _listed([f"a {thing.name}" for thing in state])


def describe_places(state: State) -> str:
    """A caption with places: `A red circle top left and a blue square bottom right.`"""
    return _listed([f"a {thing.name} {PLACES[thing.place]}" for thing in state])


def _listed(names: list[str]) -> str:
    last = names[-1] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return sentence(last)


def tell(event: Event) -> str:
    """An event as a sentence: `The red circle turns blue.`"""
    return sentence(_clause(event, _PRESENT))


def past(event: Event) -> str:
    """An event as a clause in the past: `the red circle turned blue`"""
    return _clause(event, _PAST)


def _clause(event: Event, tense: dict[str, str]) -> str:
    article = "a" if event.kind == "come" else "the"
    return f"{article} {event.who} {tense[event.kind]} {event.to}".rstrip()


def narrate(story: Story) -> str:
    """A story's caption: the first state, then every event, in order."""
    return " ".join([describe(story.states[0]), *map(tell, story.events)])


def narrate_changes(story: Story) -> list[str]:
    """A text for each second after the first: its events, or `Nothing new.`"""
    seconds = range(1, len(story.states))
    return [" ".join(map(tell, story.at(second))) or "Nothing new." for second in seconds]


def narrate_order(story: Story) -> str:
    """The caption of `narrate`, and a sentence on the order of the first and the last event."""
    first, last = story.events[0], story.events[-1]
    order = sentence(f"{past(first)} before {past(last)}")
    return f"{narrate(story)} {order}"


def _closed(task: str, question: str, answer: str, options: Sequence[str]) -> QA:
    """A question whose answer is one of several options."""
    return QA(task, question, sentence(answer), tuple(map(sentence, options)))


def colour(thing: Thing, when: str = "") -> QA:
    return _closed("colour", f"What colour is the {thing.shape}{when}?", thing.colour, [*COLOURS])


def shape(thing: Thing, when: str = "") -> QA:
    return _closed("shape", f"Which shape is {thing.colour}{when}?", thing.shape, SHAPES)


def place(thing: Thing, when: str = "") -> QA:
    return _closed("place", f"Where is the {thing.name}{when}?", PLACES[thing.place], PLACES)


def count(state: State, when: str = "") -> QA:
    return _closed("count", f"How many shapes are there{when}?", NUMBERS[len(state)], NUMBERS[1:4])


def exists(thing: Thing, state: State, rng: random.Random, when: str = "") -> QA:
    """Asks whether a shape or a colour is there. Half of the time it is one of `thing`."""
    yes = rng.random() < 0.5
    return _exists(by_one(thing, rng) if yes else absent(state, rng), yes, when)


def _exists(name: str, yes: bool, when: str) -> QA:
    return _closed("exists", f"Is there a {name}{when}?", yes_or_no(yes), ("yes", "no"))


def yes_or_no(true: bool) -> str:
    return "yes" if true else "no"


def checks(state: State, rng: random.Random) -> list[QA]:
    """Four different questions of `exists`, whose answers are yes and no equally often."""
    names = {True: _named(state), False: _missing(state)}
    for candidates in names.values():
        rng.shuffle(candidates)
    questions = []
    for _ in range(4):
        yes = rng.random() < 0.5 if all(names.values()) else bool(names[True])
        questions.append(_exists(names[yes].pop(), yes, ""))
    return questions


def by_one(thing: Thing, rng: random.Random) -> str:
    """A name of a thing: its shape, or its colour (`red shape`)."""
    return rng.choice((thing.shape, f"{thing.colour} shape"))


def absent(state: State, rng: random.Random) -> str:
    """The name of a shape or a colour that is not there."""
    return rng.choice(_missing(state))


def _named(state: State) -> list[str]:
    """The names of all shapes and colours that are there."""
    return [name for thing in state for name in (thing.shape, f"{thing.colour} shape")]


def _missing(state: State) -> list[str]:
    """The names of all shapes and colours that are not there (as many shapes as colours)."""
    every, there = [*SHAPES, *(f"{colour} shape" for colour in COLOURS)], _named(state)
    return [name for name in every if name not in there]


def about(thing: Thing, state: State, rng: random.Random, when: str = "") -> QA:
    """A question about one thing of a state."""
    ask = rng.choice((colour, shape, place, None))
    return ask(thing, when) if ask else exists(thing, state, rng, when)


def ends(story: Story) -> list[tuple[str, Event]]:
    """The first and the last event, each after its word."""
    return [("first", story.events[0]), ("last", story.events[-1])]


def order(word: str, event: Event) -> QA:
    """Asks what happens `first` or `last` (`word`), which is `event`."""
    return QA("order", f"What happens {word}?", tell(event))


def ask_still(state: State, rng: random.Random) -> list[QA]:
    """A question about each thing, so that no answer can be concluded from another; or `checks`."""
    if rng.random() < 0.2:
        return checks(state, rng)
    questions = [about(thing, state, rng) for thing in rng.sample(state, len(state))]
    return [count(state), *questions] if rng.random() < 0.25 else questions


def ask_end(state: State, rng: random.Random) -> list[QA]:
    """Questions about different things at the end of a clip; or how many there are, first."""
    when = " at the end"
    questions = [about(thing, state, rng, when) for thing in rng.sample(state, len(state))]
    return [count(state, when), *questions] if rng.random() < 0.2 else questions


def ask_text(state: State, story: Story, rng: random.Random) -> tuple[str, list[QA]]:
    """The scene or the story as a text, and questions whose answers are in it."""
    if rng.random() < 0.6:
        return describe_places(state), ask_still(state, rng)
    return narrate(story), [order(*end) for end in rng.sample(ends(story), 2)]
