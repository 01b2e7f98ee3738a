"""Scores how a model tells annotated events of a video: in time, also while it speaks, how late.

A file is a list of

    {"video": "a.mp4", "question": "Tell me what happens.",
     "events": [{"second": 4, "says": ["the circle moves", "it moves right"]}, ...],
     "interruptions": [{"second": 6, "text": "What colour is it?", "says": ["blue"]}, ...]}

An event's frame is the one of its second; each of `says` is a phrase that tells it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from inference.evaluate.streaming.forms import Entry, FormError, read_entries
from inference.evaluate.streaming.items import (
    Emission,
    Item,
    Judge,
    Point,
    PushAlone,
    TimedPrompt,
    Watched,
)
from inference.evaluate.streaming.text import words

_WORD = re.compile(r"\w+")
HOW = ("in the same breath", "after it stopped", "after it had finished")


@dataclass(frozen=True)
class EventOutcome:
    """An event, and how it was told."""

    event: dict[str, Any]
    speaking: bool  # whether the model was speaking when the event's frame came
    second: float | None = None  # of the first right word; None: it was not told in time
    end: float | None = None  # of the last word of that response
    text: str = ""  # of that response
    how: str = ""  # one of HOW, for an event that came while the model was speaking

    @property
    def delay(self) -> float | None:
        """Seconds from the event to the first right word."""
        return None if self.second is None else self.second - self.event["second"]


@dataclass
class StreamOutcome:
    """The responses in a stream, matched with its events and interruptions."""

    events: list[EventOutcome] = field(default_factory=list)
    # (interruption, whether it cut a response off, its answer or None)
    answers: list[tuple[dict[str, Any], bool, Emission | None]] = field(default_factory=list)
    matched: int = 0  # responses that told an event or answered an interruption
    false: int = 0  # responses that did neither
    spoken: int = 0  # words
    minutes: float = 0.0  # length of the stream


class Events(PushAlone):
    """The benchmark that the module describes.

    Args:
        within: seconds from an event's frame in which it is told in time.
        step: seconds between two frames.
    """

    name = "events"

    def __init__(self, within: float, step: float) -> None:
        self._within, self._step = within, step

    def read(self, file: Path, videos: Path) -> list[Item]:
        """The items of a file. Raises FormError."""
        entries = read_entries(file, ("video", "question", "events"))
        return [self._item(number, entry, videos) for number, entry in enumerate(entries)]

    def _item(self, number: int, entry: Entry, videos: Path) -> Item:
        events: list[dict[str, Any]] = [
            {"second": event.seconds("second"), "says": event.texts("says")}
            for event in entry.entries("events", ("second", "says"))
        ]
        turns = (
            entry.entries("interruptions", ("second", "text")) if "interruptions" in entry else []
        )
        interruptions: list[dict[str, Any]] = [
            {"second": turn.seconds("second"), "text": turn.text("text"),
             "says": turn.texts("says") if "says" in turn else []}
            for turn in turns
        ]  # fmt: skip
        if any(not words(phrase).strip() for event in events for phrase in event["says"]):
            raise FormError(f"{entry.place}: events: says: has a text without words")
        second = entry.seconds("asked") if "asked" in entry else 0.0
        prompts = (
            TimedPrompt(second, entry.text("question")),
            *(TimedPrompt(turn["second"], turn["text"]) for turn in interruptions),
        )
        truth = {"events": events, "interruptions": interruptions}
        name = str(entry.data.get("id", number))
        video = videos / entry.text("video")
        return Item(name, "events", video, prompts, truth=truth, points=max(1, len(events)))

    def outcome(self, item: Item, watched: Watched) -> StreamOutcome:
        """Matches responses with events (one may tell several) and with interruptions. The words
        that tell an event tell no other one: events of the same words take theirs from the latest
        to the first."""
        emissions, outcome = watched.emissions, StreamOutcome(minutes=watched.seconds / 60)
        outcome.spoken = sum(len(_WORD.findall(emission.text)) for emission in emissions)
        used: set[int] = set()
        for number, turn in enumerate(item.truth["interruptions"]):
            before = [e for e in emissions if e.turn <= number + 1]
            place = next((i for i, e in enumerate(emissions) if e.turn == number + 2), None)
            latest = before[-1] if before else None
            # On the media clock its last word came with the frame before the question.
            cut = bool(latest and latest.cut and latest.end >= turn["second"] - self._step)
            outcome.answers.append((turn, cut, None if place is None else emissions[place]))
            used |= set() if place is None else {place}
        events: list[dict[str, Any]] = item.truth["events"]
        outcomes: dict[int, EventOutcome] = {}
        taken: set[tuple[int, int, int]] = set()
        for number in sorted(range(len(events)), key=lambda n: -float(events[n]["second"])):
            outcomes[number], mention = self._event_outcome(events[number], emissions, taken)
            taken |= set() if mention is None else {mention}
        outcome.events = [outcomes[number] for number in range(len(events))]
        used |= {place for place, *_ in taken}
        outcome.matched, outcome.false = len(used), len(emissions) - len(used)
        return outcome

    def _event_outcome(
        self,
        event: dict[str, Any],
        emissions: Sequence[Emission],
        taken: Collection[tuple[int, int, int]],
    ) -> tuple[EventOutcome, tuple[int, int, int] | None]:
        """How an event was told, and the words that tell it (index of the response, first and last
        character), or None. `taken`: words that tell other events."""
        second = event["second"]
        during = next((e for e in emissions if e.second < second <= e.end), None)
        for place, emission in enumerate(emissions):
            mentions = (
                (mention, (place, *span))
                for mention, span in _mentions(emission, event["says"], second)
                if mention - second <= self._within and (place, *span) not in taken
            )
            found, words_of_it = next(mentions, (0.0, None))
            if words_of_it is None:
                continue
            how = ""
            if during is not None:
                stopped = during.end <= second + self._step
                how = HOW[0] if emission is during else HOW[1] if stopped else HOW[2]
            return EventOutcome(
                event, during is not None, found, emission.end, emission.text, how
            ), words_of_it
        return EventOutcome(event, during is not None), None

    def push(self, item: Item, watched: Watched, judge: Judge) -> list[Point]:
        emissions, outcome = watched.emissions, self.outcome(item, watched)
        points: list[Point] = []

        def add(name: str, part: str, score: float, metric: str, about: Any, text: str) -> None:
            row = f"events{': ' if part else ''}{part}"
            reference = " | ".join(about.get("says", []))
            at = about.get("second")
            points.append(
                Point(name, row, score, item.prompts[0].text, text, reference, at, metric)
            )

        for number, event_outcome in enumerate(outcome.events):
            name, text, event = f"{item.id}.{number}", event_outcome.text, event_outcome.event
            in_time = float(event_outcome.delay is not None)
            add(name, "", in_time, "told", event, text)
            part = "while speaking" if event_outcome.speaking else "in silence"
            add(name, part, in_time, "told", event, text)
            if event_outcome.delay is not None and event_outcome.end is not None:
                add(name, "first right word", event_outcome.delay, "s", event, text)
                add(name, f"first right word {part}", event_outcome.delay, "s", event, text)
                add(
                    name, "end of the answer", event_outcome.end - event["second"], "s", event, text
                )
            if event_outcome.speaking:
                for how in (*HOW, "not"):
                    share = float(how == (event_outcome.how or "not"))
                    add(name, f"while speaking, told {how}", share, "share", event, text)
        for number, (turn, cut, answer) in enumerate(outcome.answers):
            name, text = f"{item.id}.i{number}", answer.text if answer else ""
            add(name, "interrupted while speaking", float(cut), "share", turn, text)
            add(name, "interruption answered", float(answer is not None), "share", turn, text)
            if answer is not None:
                delay = answer.second - turn["second"]
                add(name, "reaction to an interruption", delay, "s", turn, text)
                if turn["says"]:
                    right = _first(answer, turn["says"], turn["second"]) is not None
                    add(name, "interruption answered rightly", float(right), "share", turn, text)
        text = " / ".join(f"{e.second:g}: {e.text}" for e in emissions)
        for part, count in (("words", outcome.spoken), ("false alarms", outcome.false)):
            add(item.id, f"{part} a minute", count / outcome.minutes, "a minute", {}, text)
        return points


def _first(emission: Emission, phrases: Sequence[str], since: float) -> float | None:
    """The second at which the first phrase begins that is said in full after `since`, or None."""
    return next((second for second, _ in _mentions(emission, phrases, since)), None)


def _mentions(
    emission: Emission, phrases: Sequence[str], since: float
) -> Iterator[tuple[float, tuple[int, int]]]:
    """Yields each time that a phrase is said in full after `since`: the second at which it begins,
    and its first and last character."""
    starts = [0, *accumulate(len(piece) for _, piece in emission.pieces)]
    before = sum(len(piece) for second, piece in emission.pieces if second < since)
    text = "".join(piece for _, piece in emission.pieces)[before:]
    spans = {
        (before + found.start(), before + found.end())
        for phrase in phrases
        for found in re.finditer(_pattern(phrase), text, re.IGNORECASE)
    }
    for start, end in sorted(spans):
        yield emission.pieces[bisect_right(starts, start) - 1][0], (start, end)


def _pattern(phrase: str) -> str:
    return r"\b" + r"\W+".join(map(re.escape, _WORD.findall(phrase))) + r"\b"
