"""OVO-Bench: twelve tasks about the past, the present and the future of a stream.

Its official protocol asks about the video from its start to `ceil(realtime)`; a forward task is
asked at each time of `test_info`. docs/evaluation.md describes push mode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference.evaluate.streaming.forms import Entry, FormError, read_entries
from inference.evaluate.streaming.items import (
    Emission,
    Item,
    Judge,
    Point,
    Poll,
    Reply,
    TimedPrompt,
    Watched,
)
from inference.evaluate.streaming.templates import Templates
from inference.evaluate.streaming.text import choice, contains_phrase, last_number
from inference.evaluate.streaming.timing import Timing

GROUPS = {
    "backward": ("EPM", "ASI", "HLD"),
    "real-time": ("OCR", "ACR", "ATR", "STU", "FPD", "OJR"),
    "forward": ("REC", "SSR", "CRR"),
}
_CHOICE = (*GROUPS["backward"], *GROUPS["real-time"])
_NEEDS = {
    "REC": ("id", "video", "activity", "test_info"),
    "SSR": ("id", "video", "all_steps", "start_time", "end_time", "test_info"),
    "CRR": ("id", "video", "question", "ask_time", "clue_time", "test_info"),
}
_POLL_NEEDS = {
    "REC": ("realtime", "count"),
    "SSR": ("realtime", "step", "type"),
    "CRR": ("realtime", "type"),
}


class OvoBench:
    """The benchmark that the module describes."""

    name = "ovobench"

    def __init__(self, templates: Templates, timing: Timing) -> None:
        self._templates, self._timing = templates, timing

    def read(self, file: Path, videos: Path) -> list[Item]:
        """The items of ovo_bench_new.json. Raises FormError."""
        return [self._item(entry, videos) for entry in read_entries(file, ("task",))]

    def _item(self, entry: Entry, videos: Path) -> Item:
        task = entry.text("task")
        if task not in (*_CHOICE, *GROUPS["forward"]):
            raise FormError(f"{entry.place}: task: {task!r} is not a task of OVO-Bench")
        needs = _NEEDS.get(task, ("id", "video", "realtime", "question", "options", "gt"))
        Entry(entry.place, entry.data, needs)
        row, video = f"ovobench {task}", videos / entry.text("video")
        if task in _CHOICE:
            return self._choice(entry, row, video)
        polls = entry.entries("test_info", _POLL_NEEDS[task], least=1)
        last = max(poll.seconds("realtime") for poll in polls)
        truth: dict[str, Any] = {
            "task": task,
            "polls": [{**poll.data, "realtime": poll.seconds("realtime")} for poll in polls],
        }
        start, second = 0.0, 0.0
        if task == "REC":
            truth["activity"] = entry.text("activity")
            text = self._templates("push.REC", entry.text("activity"))
        elif task == "SSR":
            truth["steps"] = entry.texts("all_steps")
            text = self._templates("push.SSR", "; ".join(truth["steps"]))
        else:
            second, truth["clue"] = entry.seconds("ask_time"), entry.seconds("clue_time")
            truth["question"] = entry.text("question")
            text, start = self._templates("push.CRR", truth["question"]), self._timing.start(second)
        one = 1 if task == "CRR" else None
        return Item(
            _id(entry),
            row,
            video,
            (TimedPrompt(second, text),),
            start,
            last,
            truth,
            len(polls),
            one,
        )

    def _choice(self, entry: Entry, row: str, video: Path) -> Item:
        second, options = entry.seconds("realtime"), entry.texts("options")
        right = int(entry.number("gt"))
        if not 0 <= right < len(options):
            raise FormError(f"{entry.place}: gt: {right} is not the number of an option")
        lines = [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]
        truth = {
            "task": entry.text("task"),
            "question": entry.text("question"),
            "options": "; ".join(lines) + ";",
            "choices": options,
            "answer": chr(65 + right),
            "realtime": second,
        }
        prompt = TimedPrompt(
            second, self._templates("push.choice", truth["question"], "\n".join(lines))
        )
        start, end = self._timing.start(second), self._timing.end(second)
        return Item(_id(entry), row, video, (prompt,), start, end, truth)

    def polls(self, item: Item) -> bool:
        return True

    def poll(self, item: Item, ask: Poll) -> list[Reply]:
        truth, task = item.truth, item.truth["task"]
        if task in _CHOICE:
            text = self._templates("ovobench.choice", truth["question"], truth["options"])
            return [ask(0.0, math.ceil(truth["realtime"]), text)]
        replies = []
        for poll in truth["polls"]:
            if task == "REC":
                about = f"How many times did they {truth['activity']}?"
            else:
                about = poll["step"] if task == "SSR" else truth["question"]
            text = self._templates(f"ovobench.{task}", about)
            replies.append(ask(0.0, math.ceil(poll["realtime"]), text))
        return replies

    def official(self, item: Item, replies: Sequence[Reply], judge: Judge) -> list[Point]:
        """Scores replies as OVO-Bench's own scorer does, with its quirks: a letter, Yes or No
        counts wherever it stands in the reply, in any word; all digits of it are one number."""
        truth, task = item.truth, item.truth["task"]
        if task in _CHOICE:
            (reply,) = replies
            right = truth["answer"] in reply.answer
            return [_point(item, item.id, right, reply, truth["answer"])]
        points = []
        for number, (poll, reply) in enumerate(zip(truth["polls"], replies, strict=True)):
            if task == "REC":
                reference = str(poll["count"])
                right = "".join(re.findall(r"\d+", reply.answer)) == reference
            else:
                reference = "Yes" if poll["type"] else "No"
                right = reply.answer == reference[0] or reference in reply.answer
            points.append(_point(item, f"{item.id}.{number}", right, reply, reference))
        return points

    def push(self, item: Item, watched: Watched, judge: Judge) -> list[Point]:
        truth, task, emissions = item.truth, item.truth["task"], watched.emissions
        prompt = item.prompts[0]
        if task in _CHOICE:
            answer = next((e.text for e in emissions if e.turn == 1), "")
            right = choice(answer, truth["choices"]) == truth["answer"]
            reply = Reply(item.start, prompt.second, prompt.text, answer)
            return [_point(item, item.id, right, reply, truth["answer"])]
        if task == "CRR":
            first = next((e for e in emissions if e.second >= prompt.second), None)
            right = first is not None and first.second >= truth["clue"]
            alert = f"{first.text} (at {first.second:g} s)" if first else ""
            reply = Reply(item.start, truth["clue"], prompt.text, alert)
            return [_point(item, item.id, right, reply, f"not before {truth['clue']:g} s")]
        points = []
        for number, poll in enumerate(truth["polls"]):
            emitted = [e for e in emissions if e.second <= poll["realtime"]]
            if task == "REC":
                counts = [n for e in emitted if (n := last_number(e.text)) is not None]
                now: str = str(counts[-1] if counts else 0)
                right, reference = now == str(poll["count"]), str(poll["count"])
            else:
                now = _current(emitted, truth["steps"])
                right = (now == poll["step"]) == bool(poll["type"])
                reference = poll["step"] if poll["type"] else f"not: {poll['step']}"
            reply = Reply(item.start, poll["realtime"], prompt.text, now)
            points.append(_point(item, f"{item.id}.{number}", right, reply, reference))
        return points


def _current(emissions: Sequence[Emission], steps: Sequence[str]) -> str:
    """The step that was named last; of several in one text the longest name."""
    for emission in reversed(emissions):
        named = [step for step in steps if contains_phrase(emission.text, step)]
        if named:
            return max(named, key=len)
    return ""


def _point(item: Item, name: str, right: bool, reply: Reply, reference: str) -> Point:
    return Point(name, item.row, float(right), reply.question, reply.answer, reference, reply.at)


def _id(entry: Entry) -> str:
    return str(entry.data["id"])
