"""Makes the timeline of a clip: captions of its windows, each confirmed by votes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_pipeline.synthesis.config import SynthesisConfig
from data_pipeline.synthesis.cut import Clip
from data_pipeline.synthesis.model import Frames, Model, vote


@dataclass(frozen=True)
class Timeline:
    """What happens in a clip: `second` and `text` of scenes and of events, in order of time."""

    scenes: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]

    def data(self) -> dict[str, Any]:
        return {"scenes": list(self.scenes), "events": list(self.events)}


@dataclass(frozen=True)
class ConfirmedClip:
    """The part of a clip whose captions are all confirmed, and its timeline."""

    clip: Clip
    timeline: Timeline


async def watch(clip: Clip, model: Model, config: SynthesisConfig) -> ConfirmedClip | None:
    """Captions all windows, and keeps the longest run of windows whose captions are confirmed;
    None where that is shorter than cut.shortest."""
    size, count = config.cut.window, len(clip.pictures)
    starts = range(0, count, size)
    captions = await asyncio.gather(
        *(_caption(clip, range(at, min(at + size, count)), model, config) for at in starts)
    )
    best: list[int] = []
    run: list[int] = []
    for number, caption in enumerate(captions):
        run = [*run, number] if caption is not None else []
        best = run if len(run) > len(best) else best
    if not best:
        return None
    first = best[0] * size
    length = min((best[-1] + 1) * size, count) - first
    if length < config.cut.shortest:
        return None
    scenes: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for number in best:
        caption = captions[number]
        assert caption is not None
        scenes.append({"second": number * size - first, "text": caption["scene"]})
        events += [event | {"second": event["second"] - first} for event in caption["events"]]
    return ConfirmedClip(clip.part(first, length), Timeline(tuple(scenes), tuple(events)))


async def _caption(
    clip: Clip, seconds: range, model: Model, config: SynthesisConfig
) -> dict[str, Any] | None:
    """The first caption of these seconds that is confirmed; None after 1 + recaptions tries."""
    window = range(max(0, seconds[0] - config.cut.window), seconds[-1] + 1)
    frames = [(second, clip.pictures[second]) for second in window]
    data: dict[str, Any] = {"seconds": list(seconds)}
    context = {"speech": clip.speech(seconds[0], seconds[-1]), "about": clip.about}
    question = data | {name: text for name, text in context.items() if text}
    for attempt in range(config.check.recaptions + 1):
        caption = await model.ask("caption", question, attempt, frames)
        caption["events"].sort(key=lambda event: event["second"])
        if any(event["second"] not in seconds for event in caption["events"]):
            continue
        # Each attempt has vote numbers of its own: the same caption again gets new votes.
        ask = partial(_right, model, data | caption, frames, attempt * config.check.most_votes)
        if await vote(ask, config.check.lead, config.check.most_votes):
            return caption
    return None


async def _right(
    model: Model, caption: dict[str, Any], frames: Frames, before: int, number: int
) -> bool:
    """Vote `number` on whether a caption is right; `before`: vote numbers of earlier captions."""
    return bool((await model.ask("confirm", caption, before + number, frames))["right"])
