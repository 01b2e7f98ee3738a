"""StreamingBench: multiple choice in the stream, questions that refer to each other, alerts.

Its official protocol asks about the video up to the question's second (`context` seconds of it).
For an alert it asks each second whether it is time; when the model says yes, it asks the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from inference.evaluate.streaming.forms import Entry, FormError, kind_of, read_list
from inference.evaluate.streaming.items import (
    Item,
    Judge,
    Point,
    Poll,
    Reply,
    TimedPrompt,
    Watched,
)
from inference.evaluate.streaming.templates import Templates
from inference.evaluate.streaming.text import choice
from inference.evaluate.streaming.timing import Timing

FILES = {
    "questions_real": "real", "questions_omni": "omni", "questions_sqa": "sqa",
    "questions_proactive": "proactive", "questions_proactive_50": "proactive",
}  # fmt: skip
_CHOICE = ("task_type", "question", "time_stamp", "answer", "options")
_ALERT = ("task_type", "question", "time_stamp", "ground_truth_time_stamp", "ground_truth_output")
_POLLED = 4  # seconds after the right second up to which an alert is asked about
_IN_TIME = 2.0  # seconds from the right second, within which an alert is in time


class StreamingBench:
    """The benchmark that the module describes."""

    name = "streamingbench"

    def __init__(self, templates: Templates, timing: Timing) -> None:
        self._templates, self._timing = templates, timing

    def read(self, file: Path, videos: Path) -> list[Item]:
        """The items of a questions_*.json. Raises FormError."""
        part = kind_of(file, FILES)
        items: list[Item] = []
        for number, data in enumerate(read_list(file)):
            place = f"{file}, entry {number}"
            if part == "sqa":
                if not isinstance(data, list) or not data:
                    raise FormError(f"{place}: expected a list of the questions about a video")
                items.append(self._sequence(f"{part} {number}", place, data, videos))
                continue
            entry = Entry(place, data, ("video_path", "questions"))
            needs = _ALERT if part == "proactive" else _CHOICE
            for inner, question in enumerate(entry.entries("questions", needs)):
                name, video = f"{part} {number}.{inner}", _video(entry, videos)
                make = self._alert if part == "proactive" else self._choice
                items.append(make(name, question, video, part))
        return items

    def _choice(self, name: str, question: Entry, video: Path, part: str) -> Item:
        row = f"streamingbench {part}: {question.text('task_type')}"
        prompt, truth = self._prompt_of(question)
        start, end = self._timing.start(prompt.second), self._timing.end(prompt.second)
        return Item(name, row, video, (prompt,), start, end, {"part": part, "questions": [truth]})

    def _sequence(self, name: str, place: str, data: list[Any], videos: Path) -> Item:
        entries = [
            Entry(f"{place}, {i}", one, ("video_path", "questions")) for i, one in enumerate(data)
        ]
        questions = [q for entry in entries for q in entry.entries("questions", _CHOICE, least=1)]
        prompts, truths = zip(*(self._prompt_of(q) for q in questions), strict=True)
        seconds = [prompt.second for prompt in prompts]
        start, end = self._timing.start(min(seconds)), self._timing.end(max(seconds))
        truth = {"part": "sqa", "questions": list(truths)}
        video = _video(entries[0], videos)
        return Item(name, "streamingbench sqa", video, prompts, start, end, truth, len(prompts))

    def _prompt_of(self, question: Entry) -> tuple[TimedPrompt, dict[str, Any]]:
        """The turn that asks a multiple-choice question, and what its scorer needs."""
        options = question.texts("options")
        if len(options) < 4:
            raise FormError(f"{question.place}: options: expected four, there are {len(options)}")
        if not options[0].startswith("A."):
            options = [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]
        second, text = question.seconds("time_stamp"), question.text("question")
        truth = {
            "question": text, "options": options, "answer": question.text("answer"),
            "second": second, "stamp": str(question.data["time_stamp"]),
        }  # fmt: skip
        return TimedPrompt(second, self._templates("push.choice", text, "\n".join(options))), truth

    def _alert(self, name: str, question: Entry, video: Path, part: str) -> Item:
        second, right = question.seconds("time_stamp"), question.seconds("ground_truth_time_stamp")
        text, output = question.text("question"), question.text("ground_truth_output")
        truth = {"part": part, "question": text, "output": output, "right": right}
        row, prompts = "streamingbench proactive", (TimedPrompt(second, text),)
        return Item(name, row, video, prompts, second, right + _POLLED, truth)

    def polls(self, item: Item) -> bool:
        return True

    def poll(self, item: Item, ask: Poll) -> list[Reply]:
        truth = item.truth
        if truth["part"] == "proactive":
            return self._poll_alert(item, ask)
        replies, earlier = [], ""
        for question in truth["questions"]:
            options = question["options"][:4]
            if truth["part"] == "sqa":
                name = "streamingbench.sequence"
                text = self._templates(name, earlier, question["question"], *options)
                earlier = (earlier or "What was asked before, and the right answers:") + (
                    f" At {question['stamp']}: {question['question']} {'; '.join(options)};"
                    f" answer: {question['answer']}."
                )
            else:
                text = self._templates("streamingbench.choice", question["question"], *options)
                text += "\n\nThe best option is:"
            second = question["second"]
            replies.append(ask(self._timing.start(second), second, text))
        return replies

    def _poll_alert(self, item: Item, ask: Poll) -> list[Reply]:
        question, output = item.truth["question"], item.truth["output"]
        second, replies = item.start + 1, []
        query = self._templates(
            "streamingbench.proactive",
            f'{question} Is it the right time to output "{output}"? You can only answer yes or no.',
        )
        while second <= item.truth["right"] + _POLLED:
            replies.append(ask(item.start, second, query))
            if "yes" in replies[-1].answer.strip().lower():
                text = self._templates("streamingbench.proactive", question)
                replies.append(ask(item.start, second, text))
                break
            second += 1
        return replies

    def official(self, item: Item, replies: Sequence[Reply], judge: Judge) -> list[Point]:
        """Scores replies as StreamingBench's own scorer does, with its quirks.

        Only the first character of a reply counts. The last reply to an alert, whatever it says,
        is its answer; that is right only in time and where it has the output letter by letter.
        """
        truth = item.truth
        if truth["part"] == "proactive":
            if not replies:  # it is due so long before its question that it is never asked about
                return self._alert_points(item, None, "")
            return self._alert_points(item, replies[-1].at, replies[-1].answer)
        return [
            _point(item, i, reply.answer[:1] == question["answer"], question, reply.answer)
            for i, (question, reply) in enumerate(zip(truth["questions"], replies, strict=True))
        ]

    def push(self, item: Item, watched: Watched, judge: Judge) -> list[Point]:
        truth, emissions = item.truth, watched.emissions
        if truth["part"] == "proactive":
            first = next((e for e in emissions if e.turn == 1), None)
            return self._alert_points(
                item, first.second if first else None, first.text if first else ""
            )
        # In the stream questions come in the order of their seconds, not always the file's.
        turns = sorted(range(len(item.prompts)), key=lambda number: item.prompts[number].second)
        answers = [
            next((e.text for e in emissions if e.turn == turns.index(number) + 1), "")
            for number in range(len(item.prompts))
        ]
        return [
            _point(item, i, choice(answer, q["options"]) == q["answer"], q, answer)
            for i, (q, answer) in enumerate(zip(truth["questions"], answers, strict=True))
        ]

    @staticmethod
    def _alert_points(item: Item, second: float | None, answer: str) -> list[Point]:
        right, output = item.truth["right"], item.truth["output"]
        in_time = second is not None and abs(second - right) <= _IN_TIME
        alert = "" if second is None else f"{answer} (at {second:g} s)"
        reference = f"{output} (at {right:g} s)"
        rest = (item.truth["question"], alert, reference, right)
        return [
            Point(item.id, item.row, float(in_time and output in answer), *rest),
            Point(item.id, f"{item.row} (time)", float(in_time), *rest, metric="in time"),
        ]


def _point(item: Item, number: int, right: bool, question: dict[str, Any], answer: str) -> Point:
    name = item.id if len(item.prompts) == 1 else f"{item.id}.{number}"
    text = "\n".join([question["question"], *question["options"]])
    return Point(name, item.row, float(right), text, answer, question["answer"], question["second"])


def _video(entry: Entry, videos: Path) -> Path:
    """The path of a video: the file's `./videos/a.mp4` below the folder, else `a.mp4` in it."""
    path = PurePosixPath(entry.text("video_path"))
    whole = videos / path
    return whole if whole.is_file() else videos / path.name
