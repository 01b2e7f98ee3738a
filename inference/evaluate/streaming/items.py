"""What travels: items of a benchmark -> what a model said about them -> scored points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

EARLIER_ANSWER = "##ANSWER##"  # in a question of OmniMMI


@dataclass(frozen=True)
class Ask:
    """A user's turn at a second of the video; from its end where that is negative.

    answer_to: number of an earlier question whose answer stands for EARLIER_ANSWER in the text.
    """

    second: float
    text: str
    answer_to: int | None = None


@dataclass(frozen=True)
class Item:
    """Something to watch, with the questions of push mode.

    row: task that it counts for. start, end: seconds of the source that are shown; None: its end.
    truth: what the scorer of its benchmark needs.
    """

    id: str
    row: str
    video: Path
    asks: tuple[Ask, ...]
    start: float = 0.0
    end: float | None = None
    truth: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Emission:
    """What was said at one go.

    second: of the newest frame when its first word came; on the wall clock, when it came. end: the
    same of its last word. turn: how many questions had been asked. cut: it was not finished.
    pieces: (second, text), in order, which together are `text`.
    """

    second: float
    text: str
    end: float
    turn: int = 0
    cut: bool = False
    pieces: tuple[tuple[float, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Emission:
        pieces = tuple((float(second), str(text)) for second, text in data["pieces"])
        return cls(**{**data, "pieces": pieces})


@dataclass(frozen=True)
class Watched:
    """A stream that was watched: what was said, and how many seconds were shown."""

    said: tuple[Emission, ...]
    seconds: float


@dataclass(frozen=True)
class Reply:
    """An answer of the polling protocol: about the source from `start` to `at` seconds."""

    start: float
    at: float
    question: str
    answer: str


@dataclass(frozen=True)
class Point:
    """One score, between 0 and 1, of an item or of a part of it."""

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
    """A judge's: is the answer right, and how good it is (0 to 5; of PAUC 0 to 2)."""

    right: bool
    score: float


# kind of request, question, reference, answer -> what the judge says.
Judge = Callable[[str, str, str, str], Verdict]
# start, end (None: of the source), question -> the model's answer, at the end that was resolved
Poll = Callable[[float, float | None, str], Reply]


class Benchmark(Protocol):
    """A benchmark's forms and protocols."""

    name: str

    def polls(self, item: Item) -> bool:
        """Whether it has an official protocol that is not push mode."""
        ...

    def read(self, file: Path, videos: Path) -> list[Item]: ...

    def poll(self, item: Item, ask: Poll) -> list[Reply]:
        """The official protocol, of one item."""
        ...

    def official(self, item: Item, replies: Sequence[Reply], judge: Judge) -> list[Point]: ...

    def push(self, item: Item, watched: Watched, judge: Judge) -> list[Point]: ...


class PushAlone:
    """A benchmark that has no protocol of its own."""

    def polls(self, item: Item) -> bool:
        return False

    def poll(self, item: Item, ask: Poll) -> list[Reply]:
        return []

    def official(self, item: Item, replies: Sequence[Reply], judge: Judge) -> list[Point]:
        return []


class NoJudge(Exception):
    """A score needs a judge, and there is none."""
