"""Defines what travels: items of a benchmark -> what a model said about them -> scored points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

EARLIER_ANSWER = "##ANSWER##"  # in a question of OmniMMI


@dataclass(frozen=True)
class TimedPrompt:
    """A user's turn."""

    second: float  # of the video; a negative one counts from its end
    text: str
    # Number of an earlier question, whose answer replaces EARLIER_ANSWER in the text.
    answer_to: int | None = None


@dataclass(frozen=True)
class Item:
    """An item of a benchmark: a video and questions."""

    id: str
    row: str  # row of the table that it counts for
    video: Path
    prompts: tuple[TimedPrompt, ...]  # in push mode
    start: float = 0.0  # second of the video from which it is shown
    end: float | None = None  # second up to which it is shown; None: the video's end
    truth: dict[str, Any] = field(default_factory=dict)  # what its benchmark's scorer needs
    points: int = 1  # scores of its row that come of it
    push_points: int | None = None  # the same in push mode; None: as many


@dataclass(frozen=True)
class Emission:
    """A response of the model.

    Seconds are those of the newest frame when a word came; on the wall clock, when it came.
    """

    second: float  # of the first word
    text: str
    end: float  # second of the last word
    turn: int = 0  # number of questions asked before it
    cut: bool = False  # whether it was not finished
    pieces: tuple[tuple[float, str], ...] = ()  # (second, text) in order; together `text`

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Emission:
        pieces = tuple((float(second), str(text)) for second, text in data["pieces"])
        return cls(**{**data, "pieces": pieces})


@dataclass(frozen=True)
class Watched:
    """A stream that was watched."""

    emissions: tuple[Emission, ...]
    seconds: float  # length of what was shown


@dataclass(frozen=True)
class Reply:
    """An answer of the polling protocol: about the source from `start` to `at` seconds."""

    start: float
    at: float
    question: str
    answer: str


@dataclass(frozen=True)
class Point:
    """A score of an item or of a part of it; between 0 and 1 where the metric has no unit."""

    id: str
    row: str
    score: float
    question: str
    answer: str
    reference: str
    at: float | None = None  # second to which the score refers
    metric: str = "accuracy"
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on an answer."""

    right: bool
    score: float  # 0 to 5; for PAUC 0 to 2


# kind of request (judge.py), question, reference, answer -> verdict
Judge = Callable[[str, str, str, str], Verdict]
# start, end (None: the video's), question -> the model's reply about that clip
Poll = Callable[[float, float | None, str], Reply]


class Benchmark(Protocol):
    """A benchmark: reads its files, and scores what a model said."""

    name: str

    def polls(self, item: Item) -> bool:
        """Whether an item has an official protocol, other than push mode."""
        ...

    def read(self, file: Path, videos: Path) -> list[Item]:
        """The items of a file of questions. Raises FormError."""
        ...

    def poll(self, item: Item, ask: Poll) -> list[Reply]:
        """Runs the official protocol for an item: asks about clips of its video."""
        ...

    def official(self, item: Item, replies: Sequence[Reply], judge: Judge) -> list[Point]:
        """Scores the replies of `poll`."""
        ...

    def push(self, item: Item, watched: Watched, judge: Judge) -> list[Point]:
        """Scores the responses of push mode."""
        ...


class PushAlone:
    """Base of a benchmark that has no official protocol but push mode."""

    def polls(self, item: Item) -> bool:
        return False

    def poll(self, item: Item, ask: Poll) -> list[Reply]:
        return []

    def official(self, item: Item, replies: Sequence[Reply], judge: Judge) -> list[Point]:
        return []


class NoJudge(Exception):
    """A score needs a judge, and none is configured."""
