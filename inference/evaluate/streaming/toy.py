"""The toy world as a file of events: videos whose truth is known, with events while one speaks."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.toy.build import ToyConfig
from data_pipeline.toy.render import mp4
from data_pipeline.toy.stream import NARRATE, narration
from data_pipeline.toy.world import simulate

FILE = "events.json"
_EVENTS, _SECONDS = 4, 12  # of a video; events may follow each other, so that one is still told


def write_toy_events(folder: Path, count: int, seed: int = 0) -> Path:
    """Writes `count` videos and the file of their events, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, config = [], ToyConfig()
    for number in range(count):
        story = simulate(seed * 1_000_003 + number, _SECONDS, _EVENTS)
        name = f"toy-{number:04d}.mp4"
        (folder / name).write_bytes(mp4(story, config.size, config.fps))
        speech = narration(story).speech
        events = [{"second": second, "says": [text]} for second, text in speech.items()]
        entries.append({"id": str(number), "video": name, "question": NARRATE, "events": events})
    path = folder / FILE
    path.write_text(json.dumps(entries, indent=1) + "\n")
    return path
