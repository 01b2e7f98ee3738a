"""What is true of the toy world, reckoned from its states without the code that tells it."""

from __future__ import annotations

import re

from data_pipeline.toy.world import PLACES, Story, Thing, simulate

STORIES = [simulate(seed, seconds=8, events=3) for seed in range(150)]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
Seen = dict[str, tuple[str, str]]  # shape -> colour and place


def seen(state: tuple[Thing, ...]) -> Seen:
    return {thing.shape: (thing.colour, PLACES[thing.place]) for thing in state}


def what_differs(before: Seen, after: Seen) -> list[str]:
    """The sentences about two states, found by comparing them."""
    told = []
    for shape in sorted(before.keys() | after.keys()):
        if shape not in after:
            told.append(f"The {before[shape][0]} {shape} leaves.")
        elif shape not in before:
            told.append(f"A {after[shape][0]} {shape} comes.")
        elif before[shape][0] != after[shape][0]:
            told.append(f"The {before[shape][0]} {shape} turns {after[shape][0]}.")
        elif before[shape] != after[shape]:
            (row0, column0), (row1, column1) = (x[shape][1].split() for x in (before, after))
            way = {"bottom": "down", "top": "up"}[row1] if row0 != row1 else column1
            assert (row0 != row1) != (column0 != column1)
            told.append(f"The {before[shape][0]} {shape} moves {way}.")
    return told


def history(story: Story) -> list[tuple[int, str]]:
    """Every second with its sentence."""
    states = [seen(state) for state in story.states]
    return [
        (second, told)
        for second in range(1, len(states))
        for told in what_differs(states[second - 1], states[second])
    ]


def past(told: str) -> str:
    for now, then in (
        ("comes", "came"),
        ("leaves", "left"),
        ("moves", "moved"),
        ("turns", "turned"),
    ):
        told = told.replace(now, then)
    return told[0].lower() + told[1:].rstrip(".")


def there(name: list[str], now: Seen) -> bool:
    """Whether `circle`, or `red shape`, is in a state."""
    return name[0] in now if len(name) == 1 else name[0] in {colour for colour, _ in now.values()}


def things(caption: str) -> Seen:
    """What `A red circle top left and a blue square bottom right.` names, places where told."""
    names = re.findall(r"a (\w+) (\w+)(?: (\w+ (?:left|right)))?", caption.lower())
    return {shape: (colour, place) for colour, shape, place in names}


def lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
