"""From what is asked and said at which second of a clip to a real-time conversation.

A frame is shown each second, and after it the model says `<|silence|>` or the words that fit into
that second (docs/data.md). A question stands before the first frame at or after its second, an
answer after the first frame at or after its own: nothing is said before it can be seen. An answer
longer than `pace` words goes on after the next frame, and ends with `<|silence|>`. A newer question
cuts off what is being said, as it does when the model runs.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, SampleError
from data_pipeline.seconds import parse_seconds
from data_pipeline.video import VideoInfo

SILENCE = "<|silence|>"
LONGEST = 100 * 3600  # seconds: a mark is written for each, and no clip is longer
PACE = 30  # words between two frames: MOSS-Video's data has 25 to 37
_ROUNDED = 0.5  # seconds past the end of a clip that are taken for its end
# A word, with the space before it; of scripts without spaces a character.
DENSE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u303f"
_WORD = re.compile(rf"\s*(?:[{DENSE}]|[^\s{DENSE}]+)")


@dataclass(frozen=True)
class TimedText:
    """A text and its second. `goes_on`: the next one continues it, without a silence between."""

    second: float
    text: str
    goes_on: bool = False


@dataclass(frozen=True)
class Timeline:
    """What is asked and answered while a clip is shown.

    start, end: seconds of the first frame and of the last (None: the clip's). frames: the seconds
    of all frames, in place of one a second. pictures: each frame is a picture, not one of a clip.
    late: whether what comes after the clip's end is left out and noted, not a reason to reject.
    """

    questions: tuple[TimedText, ...]
    answers: tuple[TimedText, ...]
    system: str = ""
    start: float = 0.0
    end: float | None = None
    frames: tuple[float, ...] | None = None
    pictures: bool = False
    late: bool = False
    pace: int = PACE

    def __post_init__(self) -> None:
        """Sorts all by time; SampleError for an answer before there is a question."""
        for name in ("questions", "answers"):
            ordered = sorted(getattr(self, name), key=lambda one: one.second)
            object.__setattr__(self, name, tuple(ordered))
        if self.answers and self.questions[0].second > self.answers[0].second:
            raise SampleError(
                "answer_before_question",
                f"an answer at {self.answers[0].second:g} s, the first question at "
                f"{self.questions[0].second:g} s",
            )


@dataclass(frozen=True)
class Unrolled:
    """A timeline as a conversation, and the seconds of its frames."""

    messages: list[dict[str, str]]
    times: tuple[float, ...]
    notes: list[str]


def words_of(text: str) -> list[str]:
    """The words of a text, each with the space before it; of scripts without spaces characters."""
    words = _WORD.findall(text.strip())
    spaced = words and not re.match(rf"[{DENSE}]", words[0])
    return [f" {words[0]}", *words[1:]] if spaced else words


def second_of(value: object, field: str) -> float:
    """Seconds of a time as `parse_seconds` takes it; SampleError(`bad_time`) names the field."""
    try:
        second = parse_seconds(value)
    except ValueError as error:
        raise SampleError("bad_time", f"{field}: {error}") from None
    if second > LONGEST:
        raise SampleError("bad_time", f"{field}: {value!r}: more than {LONGEST} s")
    return second


def order_notes(texts: Sequence[TimedText], what: str) -> list[str]:
    """A note where the source does not have them in the order of time."""
    seconds = [one.second for one in texts]
    return [] if seconds == sorted(seconds) else [f"{what} not in the order of time, sorted"]


def unroll(timeline: Timeline, info: VideoInfo | None) -> Unrolled:
    """The conversation of a clip (None: of pictures). SampleError where something is after it."""
    frames = _frames(timeline, info)
    notes: list[str] = []
    end = info.duration if info is not None else frames[-1] + 1
    end = end if timeline.end is None else min(end, timeline.end + 1)
    kept_questions = _before_end(timeline.questions, "question", end, timeline.late, notes)
    answers = _before_end(timeline.answers, "answer", end, timeline.late, notes)
    if timeline.answers and not answers:
        raise SampleError("answer_after_end", f"every answer is after the clip's end, {end:.2f} s")
    last = frames[-1]
    if any(answer.second > last for answer in answers):
        notes.append("answer in the clip's last second, said after its last frame")
    answers_left = deque(replace(answer, second=min(answer.second, last)) for answer in answers)
    waiting = deque(one for one in kept_questions if one.second <= last)
    conversation = _Conversation(timeline, notes)
    conversation.ask([waiting.popleft() for _ in _until(waiting, frames[0])], first=True)
    for second in frames:
        if questions := [waiting.popleft() for _ in _until(waiting, second)]:
            conversation.ask(questions, at_once=questions[-1].second < second)
        conversation.show([answers_left.popleft() for _ in _until(answers_left, second)])
    return Unrolled(conversation.finished(), tuple(frames), notes)


def _frames(timeline: Timeline, info: VideoInfo | None) -> list[float]:
    if timeline.frames is not None:
        return list(timeline.frames)
    assert info is not None
    end = info.duration - 1e-3 if timeline.end is None else timeline.end
    end = min(end, info.duration - 1e-3)
    count = math.floor(end - timeline.start) + 1
    if count < 1:
        raise SampleError(
            "frame_after_end",
            f"the first frame is wanted at {timeline.start:g} s, the clip ends at "
            f"{info.duration:.2f} s",
        )
    return [timeline.start + i for i in range(count)]


def _before_end(
    texts: Sequence[TimedText], what: str, end: float, late: bool, notes: list[str]
) -> list[TimedText]:
    after = [one for one in texts if one.second > end + _ROUNDED]
    if after and not late:
        raise SampleError(
            f"{what}_after_end", f"{what} at {after[0].second:g} s, the clip ends at {end:.2f} s"
        )
    notes += [f"{what} after the clip's end, left out"] * len(after)
    return list(texts[: len(texts) - len(after)])


def _until(waiting: deque[TimedText], second: float) -> list[TimedText]:
    return [one for one in waiting if one.second <= second + 1e-6]


class _Conversation:
    """The turns while frame after frame is shown."""

    def __init__(self, timeline: Timeline, notes: list[str]) -> None:
        self._timeline, self._notes = timeline, notes
        self._messages: list[dict[str, str]] = []
        if timeline.system:
            self._messages.append({"role": "system", "content": timeline.system})
        self._content = ""
        self._words: deque[str] = deque()  # that are left of what is being said
        self._goes_on = False  # what is being said has a continuation to come
        self._pending: deque[TimedText] = deque()

    def ask(self, questions: list[TimedText], *, at_once: bool = True, first: bool = False) -> None:
        """A user's turn; `at_once`: the model decides once before the next frame."""
        if not first:
            if self._words:
                self._notes.append("answer cut off by a newer question")
            if self._pending:
                self._notes += ["answer left out for a newer question"] * len(self._pending)
            self._words.clear()
            self._pending.clear()
            self._goes_on = False
            self._messages.append({"role": "assistant", "content": self._content})
        text = "\n".join(question.text for question in questions)
        self._messages.append({"role": "user", "content": text})
        self._content = SILENCE if at_once else ""

    def show(self, answers: list[TimedText]) -> None:
        """The next frame, and what is said after it; `answers` are due from now on."""
        self._content += IMAGE_MARK if self._timeline.pictures else VIDEO_MARK
        if self._pending and answers:
            self._notes += ["answer later than its second, behind another"] * len(answers)
        self._pending += answers
        spoken = self._next_words(self._timeline.pace)
        self._content += spoken if self._words or (spoken and self._goes_on) else spoken + SILENCE

    def _next_words(self, most: int) -> str:
        words: list[str] = []
        while len(words) < most:
            if not self._words:
                if not self._pending or (words and not self._goes_on):
                    break
                self._begin(self._pending.popleft())
            words.append(self._words.popleft())
        return "".join(words)

    def _begin(self, timed: TimedText) -> None:
        words = words_of(timed.text)
        self._words = deque(words if self._goes_on else [words[0].lstrip(), *words[1:]])
        self._goes_on = timed.goes_on

    def finished(self) -> list[dict[str, str]]:
        """The messages at the end: nothing has to wait after the last frame, so what is left is
        said at once."""
        while self._words or self._pending:
            if not self._words:  # a whole answer had to wait for another
                self._content = self._content.removesuffix(SILENCE)
                self._goes_on = True
            self._content += self._next_words(sum(map(len, self._words)) or self._timeline.pace)
        if not self._content.endswith((SILENCE, VIDEO_MARK, IMAGE_MARK)):
            self._content += SILENCE
        return [*self._messages, {"role": "assistant", "content": self._content}]
