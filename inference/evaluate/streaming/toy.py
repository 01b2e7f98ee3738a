"""The toy world as a file of events: videos whose truth is known, with events while one speaks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from data_pipeline.toy.build import ToyConfig
from data_pipeline.toy.render import mp4
from data_pipeline.toy.stream import NARRATE, narration, question_at
from data_pipeline.toy.world import Story, simulate

FILE = "events.json"
_EVENTS, _SECONDS = 4, 12  # of a video; events may follow each other, so that one is still told


def write_toy_events(folder: Path, count: int, seed: int = 0, interruptions: int = 0) -> Path:
    """Writes `count` videos and the file of their events, which is returned.

    interruptions: in so many of the videos, the last ones, a question is asked about what is there,
    a second after an event's frame, while it may be told; nothing happens after that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, config = [], ToyConfig()
    for number in range(count):
        story = simulate(seed * 1_000_003 + number, _SECONDS, _EVENTS)
        name = f"toy-{number:04d}.mp4"
        entry: dict[str, Any] = {"id": str(number), "video": name, "question": NARRATE}
        if number >= count - interruptions:
            told = list(narration(story).speech)
            second = told[len(told) // 2] + 1
            story = _still_from(story, second)
            asked = question_at(story.states[-1], random.Random(number))
            turn = {"second": second, "text": asked.question, "says": [asked.answer.rstrip(".")]}
            entry["interruptions"] = [turn]
        (folder / name).write_bytes(mp4(story, config.size, config.fps))
        speech = narration(story).speech
        entry["events"] = [{"second": at, "says": [text]} for at, text in speech.items()]
        entries.append(entry)
    path = folder / FILE
    path.write_text(json.dumps(entries, indent=1) + "\n")
    return path


def _still_from(story: Story, second: int) -> Story:
    """The story, in which nothing happens from a second on."""
    events = tuple(event for event in story.events if event.second < second)
    rest = story.states[second - 1 : second] * (len(story.states) - second)
    return Story(story.states[:second] + rest, events)
