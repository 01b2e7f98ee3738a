"""A candidate that a model has written, and the checks of it that need no model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from data_pipeline.importers.timeline import TimedText, words_of

# Words that betray that the writer read time stamps, captions or a file, not what is on screen.
_LEAKS = re.compile(
    r"\b\d+:\d\d\b"
    r"|\b\d+(?:\.\d+)?\s?(?:s|sec|secs|seconds?|min|minutes?)\b"
    r"|\bseconds?\s+(?:\d+|zero|one|two|three|four|five|six|seven|eight|nine|ten)\b"
    r"|\b(?:time ?stamps?|captions?|footage|video|clip|frames?|transcript|timeline)\b",
    re.IGNORECASE,
)
# Numbers of questions, and of answers, of each role.
_SHAPES: dict[str, tuple[int, tuple[int, float]]] = {
    "fire_once": (1, (1, 1)),
    "resident": (1, (1, math.inf)),
    "commentary": (1, (1, math.inf)),
    "counting": (1, (1, math.inf)),
    "interruption": (2, (2, math.inf)),
    "self_correction": (1, (2, math.inf)),
    "never": (1, (0, 0)),
}
_AT_ONCE = ("commentary", "interruption", "self_correction")  # roles whose answer may be at once


@dataclass(frozen=True)
class Candidate:
    """A conversation about a clip; seconds count from its start."""

    role: str
    questions: tuple[TimedText, ...]
    answers: tuple[TimedText, ...]

    def data(self) -> dict[str, Any]:
        """The conversation as plain values: the form of requests, outcomes and records."""
        return {
            name: [{"second": int(one.second), "text": one.text} for one in getattr(self, name)]
            for name in ("questions", "answers")
        }

    def question_at(self, second: float) -> TimedText:
        """The latest question asked by a second; before any, the first question."""
        earlier = [question for question in self.questions if question.second <= second]
        return earlier[-1] if earlier else self.questions[0]


def candidate_of(role: str, written: dict[str, Any]) -> Candidate:
    """The candidate that one sample of a `write` reply describes."""
    questions, answers = (
        tuple(sorted((TimedText(float(one["second"]), " ".join(one["text"].split()))
                      for one in written[name]), key=lambda one: one.second))
        for name in ("questions", "answers")
    )  # fmt: skip
    return Candidate(role, questions, answers)


def fault(candidate: Candidate, seconds: int, pace: int) -> tuple[str, str] | None:
    """The reason and detail of the first fault in form, words or rate; None where it has none.

    Args:
        seconds: length of the clip; it has a frame each second.
        pace: words that the model says after each frame.
    """
    wrong = _form(candidate, seconds)
    if wrong:
        return "form", wrong
    for one in (*candidate.questions, *candidate.answers):
        leak = _LEAKS.search(one.text)
        if leak:
            return "leaked_time", f"{leak[0]!r} in {one.text!r}"
    late = _too_fast(candidate, seconds, pace)
    return ("emission_rate", late) if late else None


def _form(candidate: Candidate, seconds: int) -> str:
    """What is wrong with the number, order or place of questions and answers; "": nothing."""
    questions, answers = candidate.questions, candidate.answers
    count, (least, most) = _SHAPES[candidate.role]
    if len(questions) != count:
        return f"{len(questions)} questions, {candidate.role} has {count}"
    if not least <= len(answers) <= most:
        return f"{len(answers)} answers to {candidate.role}"
    for one in (*questions, *answers):
        if not one.text:
            return f"an empty text at second {one.second:g}"
        if not 0 <= one.second < seconds:
            return f"second {one.second:g} is not in the clip, 0 to {seconds - 1}"
    if len({one.second for one in answers}) < len(answers):
        return "two answers in one second"
    first = questions[0].second
    if any(answer.second < first or (answer.second == first and candidate.role not in _AT_ONCE)
           for answer in answers):  # fmt: skip
        return "an answer before there is something to answer"
    if candidate.role == "self_correction" and any(
        same_words(a.text, b.text) for a, b in pairwise(answers)
    ):
        return "a correction that says the same"
    if candidate.role == "interruption":
        newer = questions[1].second
        if not (first < newer and answers[0].second < newer <= answers[-1].second):
            return "the newer question must come after an answer to the older, and have one"
    return ""


def _too_fast(candidate: Candidate, seconds: int, pace: int) -> str:
    """The first answer that is still being said when the next one, or the clip's end, comes; "":
    there is none. An answer that a newer question cuts off is not a fault."""
    ends_by = [*(answer.second for answer in candidate.answers), float(seconds)][1:]
    for answer, following in zip(candidate.answers, ends_by, strict=True):
        words = len(words_of(answer.text))
        ends = answer.second + math.ceil(words / pace)
        cut = any(answer.second < question.second < ends for question in candidate.questions)
        if ends > following and not cut:
            return f"{words} words from second {answer.second:g}, {following:g} is next"
    return ""


def same_words(a: str, b: str) -> bool:
    """Whether two texts are equal but for case and punctuation."""
    return _words(a) == _words(b)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def duplicate_of(candidate: Candidate, others: Sequence[Candidate], similar: float) -> str:
    """The question of the first of `others` that asks the same and answers in the same seconds;
    "": there is none. Two questions ask the same from a share of `similar` common words."""
    for other in others:
        seconds = [[a.second for a in one.answers] for one in (candidate, other)]
        if candidate.role != other.role or seconds[0] != seconds[1]:
            continue
        pairs = zip(candidate.questions, other.questions, strict=True)
        if all(_overlap(mine.text, theirs.text) >= similar for mine, theirs in pairs):
            return other.questions[0].text
    return ""


def _overlap(a: str, b: str) -> float:
    """The Jaccard index of two texts' words, 0..1."""
    mine, theirs = set(_words(a)), set(_words(b))
    return len(mine & theirs) / max(len(mine | theirs), 1)
