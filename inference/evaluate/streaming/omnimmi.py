"""OmniMMI: action prediction (AP), state grounding (SG), dependent questions (MD), proactive alerts
(PA), turns to keep silent in (PT), speaker identification (SI).

Its official protocol asks AP, SI and PT about the whole video, SG and MD about the video up to the
end of each question's span, with the conversation so far. PA has push mode alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference.evaluate.streaming.forms import Entry, kind_of, read_entries
from inference.evaluate.streaming.items import (
    EARLIER_ANSWER,
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
from inference.evaluate.streaming.timing import Timing

FILES = {
    "action_prediction": "AP", "dynamic_state_grounding": "SG",
    "multiturn_dependency_reasoning": "MD", "proactive_alerting": "PA",
    "proactive_turntaking": "PT", "speaker_identification": "SI",
}  # fmt: skip
_NEEDS = {
    "AP": ("video", "question", "answer", "vocab"), "SG": ("video", "qa"), "MD": ("video", "qa"),
    "PA": ("video", "question", "answer"), "PT": ("video", "conversation"),
    "SI": ("video", "question", "answer", "timestamp"),
}  # fmt: skip
_LATE = -5.0  # seconds, counted from the end, at which AP and PT are asked in push mode


class OmniMMI:
    """The benchmark that the module describes."""

    name = "omnimmi"

    def __init__(self, templates: Templates, timing: Timing) -> None:
        self._templates, self._timing = templates, timing

    def read(self, file: Path, videos: Path) -> list[Item]:
        """The items of one of FILES. Raises FormError."""
        task = kind_of(file, FILES)
        return [
            self._item(f"{task} {number}", task, entry, videos)
            for number, entry in enumerate(read_entries(file, _NEEDS[task]))
        ]

    def _item(self, name: str, task: str, entry: Entry, videos: Path) -> Item:
        video = _video(entry, videos)
        truth: dict[str, Any] = {"task": task}
        start, end = 0.0, None
        if task in ("SG", "MD"):
            turns = entry.entries("qa", ("question", "answer", "timestamp"), least=1)
            spans = [turn.span("timestamp") for turn in turns]
            truth["turns"] = [
                {"question": turn.text("question"), "answer": turn.text("answer"), "end": span[1]}
                for turn, span in zip(turns, spans, strict=True)
            ]
            prompts = tuple(
                TimedPrompt(
                    sum(span) / 2, turn.text("question"), i - 1 if i and task == "MD" else None
                )
                for i, (turn, span) in enumerate(zip(turns, spans, strict=True))
            )
            start, end = self._timing.start(prompts[0].second), self._timing.end(prompts[-1].second)
        elif task == "PA":
            truth["span"], prompts = (
                entry.span("answer"),
                (TimedPrompt(0.0, entry.text("question")),),
            )
        elif task == "PT":
            talk = [f"{kind}\n{text}" for turn in entry.entries("conversation", ())[-2:]
                    for kind, text in turn.data.items()]  # fmt: skip
            truth["talk"] = "\n".join(talk)
            prompts = (TimedPrompt(_LATE, truth["talk"]),)
        else:
            text, second = entry.text("question"), _LATE
            truth["turns"] = [{"question": text, "answer": entry.text("answer")}]
            if task == "AP":
                text = self._templates("push.AP", text, ", ".join(entry.texts("vocab")))
            else:
                second = entry.seconds("timestamp")
                start, end = self._timing.start(second), self._timing.end(second)
            prompts = (TimedPrompt(second, text),)
        return Item(name, f"omnimmi {task}", video, prompts, start, end, truth)

    def polls(self, item: Item) -> bool:
        return item.truth["task"] != "PA"

    def poll(self, item: Item, ask: Poll) -> list[Reply]:
        truth, task = item.truth, item.truth["task"]
        if task not in ("SG", "MD"):
            return [ask(0.0, None, item.prompts[0].text)]
        replies: list[Reply] = []
        conversation = ""
        for turn in truth["turns"]:
            text = turn["question"]
            if task == "MD":
                text = text.replace(EARLIER_ANSWER, replies[-1].answer) if replies else text
            else:
                conversation += f"user\n{text}\nassistant\n"
                text = conversation
            replies.append(ask(0.0, float(int(turn["end"])), text))
            conversation += f"{replies[-1].answer}\n"
        return replies

    def official(self, item: Item, replies: Sequence[Reply], judge: Judge) -> list[Point]:
        """Scores replies. In PT silence is right, also as `<2>`, as its models write it."""
        if item.truth["task"] == "PT":
            silent = replies[0].answer == "" or replies[0].answer.startswith("<2>")
            return [_turn_point(item, silent, replies[0].answer)]
        return _judged(item, [reply.answer for reply in replies], judge)

    def push(self, item: Item, watched: Watched, judge: Judge) -> list[Point]:
        task, emissions = item.truth["task"], watched.emissions
        if task == "PA":
            return _alert_points(item, emissions)
        if task == "PT":
            after = [e.text for e in emissions if e.turn == 1]
            return [_turn_point(item, not after, " ".join(after))]
        turns = range(1, len(item.prompts) + 1)
        answers = [next((e.text for e in emissions if e.turn == turn), "") for turn in turns]
        return _judged(item, answers, judge)


def _judged(item: Item, answers: Sequence[str], judge: Judge) -> list[Point]:
    """Points of answers that a judge compares with the references, by the questions of the file.

    An item is right where all its turns are. SG and MD also have a row `(turns)` with each turn.
    """
    turns = item.truth["turns"]
    pairs = list(zip(turns, answers, strict=True))
    verdicts = [judge("match", turn["question"], turn["answer"], answer) for turn, answer in pairs]
    right = float(all(verdict.right for verdict in verdicts))
    mean = sum(verdict.score for verdict in verdicts) / len(verdicts)
    questions, references = ("\n".join(t[name] for t in turns) for name in ("question", "answer"))
    rest = (questions, "\n".join(answers), references)
    points = [
        Point(item.id, item.row, right, *rest),
        Point(item.id, f"{item.row} (score)", mean, *rest, metric="judge's score of 5"),
    ]
    if item.truth["task"] in ("SG", "MD"):
        points += [
            Point(f"{item.id}.{i}", f"{item.row} (turns)", float(verdict.right), turn["question"],
                  answer, turn["answer"], turn["end"])
            for i, ((turn, answer), verdict) in enumerate(zip(pairs, verdicts, strict=True))
        ]  # fmt: skip
    return points


def _alert_points(item: Item, emissions: Sequence[Emission]) -> list[Point]:
    """Points of alerts, scored as OmniMMI's own scorer does: alerts in second 0 do not count, and
    there is no tolerance."""
    first, last = item.truth["span"]
    alerts = [e.second for e in emissions if int(e.second) != 0]
    inside = [first <= second <= last for second in alerts]
    accuracy = precision = overlap = 0.0
    if alerts:
        accuracy, precision = float(inside[0]), sum(inside) / len(inside)
        whole = max(alerts[-1], last) - min(alerts[0], first)
        common = max(0.0, min(alerts[-1], last) - max(alerts[0], first))
        overlap = common / whole if whole else 0.0
    spoken = "; ".join(f"{e.second:g} s: {e.text}" for e in emissions)
    rest = (item.prompts[0].text, spoken, f"{first:g} to {last:g} s", first)
    return [
        Point(item.id, item.row, accuracy, *rest),
        Point(item.id, f"{item.row} (precision)", precision, *rest, metric="precision"),
        Point(item.id, f"{item.row} (IoU)", overlap, *rest, metric="IoU"),
    ]


def _turn_point(item: Item, silent: bool, answer: str) -> Point:
    return Point(item.id, item.row, float(silent), item.truth["talk"], answer, "(silence)")


def _video(entry: Entry, videos: Path) -> Path:
    name = entry.text("video")
    return next(
        (path for path in (videos / name, videos / "videos" / name) if path.is_file()),
        videos / name,
    )
