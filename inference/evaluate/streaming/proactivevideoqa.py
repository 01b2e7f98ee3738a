"""ProactiveVideoQA: a question at the start, to which answers are due at certain times.

Its protocol is push mode. A judge marks how much of each reference answer the responses so far
cover. The score, PAUC, is the area under that mark over the span in which the answer is due.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from inference.evaluate.streaming.forms import Entry, FormError, read_entries
from inference.evaluate.streaming.items import (
    Item,
    Judge,
    Point,
    PushAlone,
    TimedPrompt,
    Watched,
)

OMEGAS = (0.0, 0.5, 1.0)
_BEST, _START = 2.0, 0.5  # the best mark (0 to 2), and the mark before a word is said


class ProactiveVideoQA(PushAlone):
    """The benchmark that the module describes."""

    name = "proactivevideoqa"

    def read(self, file: Path, videos: Path) -> list[Item]:
        """The items of an anno.json, whose folder (EGO, TV, VAD, WEB) names their row. Raises
        FormError."""
        part = file.parent.name or file.stem
        return [
            self._item(part, entry, videos)
            for entry in read_entries(file, ("video", "question_id", "conversation", "answer"))
        ]

    def _item(self, part: str, entry: Entry, videos: Path) -> Item:
        talk = entry.entries("conversation", ("role", "content", "time"))
        prompts = tuple(
            TimedPrompt(turn.seconds("time"), turn.text("content"))
            for turn in talk
            if turn.text("role") == "user"
        )
        answers = entry.entries("answer", ("content", "reply_timespan"))
        if not prompts or not answers:
            raise FormError(f"{entry.place}: conversation, answer: a question and an answer needed")
        spans = [answer.span("reply_timespan") for answer in answers]
        for answer, (start, end) in zip(answers, spans, strict=True):
            if end <= start:
                raise FormError(f"{answer.place}: reply_timespan: {start:g} to {end:g} is empty")
        due = [
            answer.span("related_timespan") if "related_timespan" in answer else span
            for answer, span in zip(answers, spans, strict=True)
        ]
        truth = {
            "answers": [
                {"text": answer.text("content"), "span": span, "due": related[1]}
                for answer, span, related in zip(answers, spans, due, strict=True)
            ]
        }
        name, video = str(entry.data["question_id"]), videos / entry.text("video")
        beside = videos / "videos" / entry.text("video")
        video = video if video.is_file() or not beside.is_file() else beside
        row = f"proactivevideoqa {part}"
        end = max(span[1] for span in spans)
        return Item(name, row, video, prompts, 0.0, end, truth, len(answers))

    def push(self, item: Item, watched: Watched, judge: Judge) -> list[Point]:
        """Scores each answer. A response counts from the second of its last word."""
        points = []
        for number, answer in enumerate(item.truth["answers"]):
            start, end = answer["span"]
            marks, texts = {}, list[str]()
            for emission in watched.emissions:
                if start <= emission.end <= end and emission.text not in texts:
                    texts.append(emission.text)
                    verdict = judge(
                        "coverage", item.prompts[0].text, answer["text"], " ".join(texts)
                    )
                    marks[emission.end] = verdict.score
            marks = _forgiven(marks, answer["due"])
            rest = (item.prompts[0].text, " ".join(texts), answer["text"], start)
            points += [
                Point(f"{item.id}.{number}", _row(item.row, omega), pauc(marks, start, end, omega),
                      *rest, metric=f"PAUC, omega {omega:g}")
                for omega in OMEGAS
            ]  # fmt: skip
        return points


def _row(row: str, omega: float) -> str:
    return row if omega == 0.5 else f"{row} (omega {omega:g})"


def _forgiven(marks: Mapping[float, float], second_due: float) -> dict[float, float]:
    """The marks without those after `second_due` that are lower than the mark by then."""
    before = [mark for second, mark in sorted(marks.items()) if second <= second_due]
    least = before[-1] if before else 0.0
    return {s: mark for s, mark in sorted(marks.items()) if s <= second_due or mark >= least}


def pauc(marks: Mapping[float, float], start: float, end: float, omega: float) -> float:
    """The area, 0 to 1, under the steps of `marks` (second -> 0 to 2) between `start` and `end`.

    Seconds since `start` count (1 - omega) times: with omega 1 only what is said counts, not when.
    See arXiv 2507.09313; details as in ports of the benchmark's code.
    """
    length, level, before, area = end - start, _START, 0.0, 0.0
    for second, mark in sorted(marks.items()):
        at = (second - start) * (1 - omega)
        area += (at - before) * level
        before, level = at, mark
    return (area + (length - before) * level) / (length * _BEST)
