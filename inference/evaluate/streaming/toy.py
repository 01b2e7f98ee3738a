"""Makes toy videos with a file of their events, some of which come while a model still speaks."""

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
# Of a video. Events may follow each other closely, so that one comes while another is told.
_EVENTS, _SECONDS = 4, 12


def write_toy_events(folder: Path, count: int, seed: int = 0, interruptions: int = 0) -> Path:
    """Writes `count` videos and the file of their events; returns the path of that.

    interruptions: number of videos, the last ones, with a question about what is on screen. It
    comes a second after an event's frame, while the event may still be told; nothing happens later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries, config = [], ToyConfig()
    for number in range(count):
        story = simulate(seed * 1_000_003 + number, _SECONDS, _EVENTS)
        name = f"toy-{number:04d}.mp4"
        entry: dict[str, Any] = {"id": str(number), "video": name, "question": NARRATE}
        if number >= count - interruptions:
            speech_seconds = list(narration(story).speech)
            second = speech_seconds[len(speech_seconds) // 2] + 1
            story = _still_from(story, second)
            qa = question_at(story.states[-1], random.Random(number))
            turn = {"second": second, "text": qa.question, "says": [qa.answer.rstrip(".")]}
            entry["interruptions"] = [turn]
        (folder / name).write_bytes(mp4(story, config.size, config.fps))
        speech = narration(story).speech
        entry["events"] = [{"second": at, "says": [text]} for at, text in speech.items()]
        entries.append(entry)
    path = folder / FILE
    path.write_text(json.dumps(entries, indent=1) + "\n")
    return path


def _still_from(story: Story, second: int) -> Story:
    """The story up to a second, with nothing happening from there on."""
    events = tuple(event for event in story.events if event.second < second)
    rest = story.states[second - 1 : second] * (len(story.states) - second)
    return Story(story.states[:second] + rest, events)
