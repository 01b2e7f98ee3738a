"""Words for the toy world: captions, questions and answers, second-by-second comments."""

from __future__ import annotations

import random
from collections.abc import Sequence

from data_pipeline.toy.world import Event, Story, Thing

QA = tuple[str, str]
_NUMBERS = ("no", "one", "two", "three", "four")


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _listing(names: Sequence[str]) -> str:
    listed = [_article(name) for name in names]
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _present(things: Sequence[Thing]) -> list[Thing]:
    return [thing for thing in things if thing.present]


def describe_still(things: Sequence[Thing]) -> str:
    """`A red circle and a blue square.`, from left to right."""
    ordered = sorted(_present(things), key=lambda thing: thing.x)
    return _sentence(_listing([thing.name for thing in ordered]))


def describe_event(event: Event) -> str:
    if event.kind == "appear":
        return _sentence(f"{_article(event.who)} appears")
    if event.kind == "leave":
        return f"The {event.who} leaves."
    if event.kind == "change":
        return f"The {event.who} turns {event.other}."
    return f"The {event.who} and the {event.other} collide."


def describe_story(story: Story) -> str:
    """Who is there at the start, then every event in order; the same collision only once."""
    start = [thing.name for thing in _present(story.frames[0])]
    verb = "moves" if len(start) == 1 else "move"
    told = dict.fromkeys(describe_event(event) for event in story.events)
    return " ".join([_sentence(f"{_listing(start)} {verb}"), *told])


def ask_still(things: Sequence[Thing], rng: random.Random) -> QA:
    present = _present(things)
    thing = rng.choice(present)
    return rng.choice(
        [
            ("How many shapes are there?", _sentence(_NUMBERS[len(present)])),
            (f"What colour is the {thing.shape}?", _sentence(thing.colour)),
            (f"Which shape is {thing.colour}?", f"The {thing.shape}."),
            ("What do you see?", describe_still(things)),
        ]
    )


def ask_story(story: Story, rng: random.Random) -> QA:
    """A question about the clip whose answer follows from the simulation."""
    start, end = _present(story.frames[0]), _present(story.frames[-1])
    options: list[QA] = [
        ("How many shapes are there at the start?", _sentence(_NUMBERS[len(start)])),
        ("How many shapes are there at the end?", _sentence(_NUMBERS[len(end)])),
        ("What happens?", describe_story(story)),
    ]
    for thing in end:
        options.append((f"What colour is the {thing.shape} at the end?", _sentence(thing.colour)))
    by_kind = {kind: [e for e in story.events if e.kind == kind] for kind in _QUESTIONS}
    for kind, question in _QUESTIONS.items():
        told = dict.fromkeys(describe_event(event) for event in by_kind[kind])
        options.append((question, " ".join(told) or "Nothing."))
    return rng.choice(options)


_QUESTIONS = {
    "appear": "What appears?",
    "leave": "What leaves?",
    "change": "What changes colour?",
    "collide": "Which shapes collide?",
}


def ask_text(things: Sequence[Thing], rng: random.Random) -> QA:
    """A question that needs no picture: the scene is told in words."""
    question, answer = ask_still(things, rng)
    return f"{describe_still(things)} {question}", answer
