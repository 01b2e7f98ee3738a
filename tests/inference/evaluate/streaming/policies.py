"""Speakers whose scores are known by arithmetic. All see the real frames of a real video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from inference.evaluate.streaming.items import Emission, Item, Verdict
from inference.evaluate.streaming.speaker import Watching
from tests.inference.evaluate.streaming.published import perceived, script

Lines = list[tuple[float, str]]


class Policy:
    """lines: what is said of an item, and when; said each second where there is `each_second`.
    reply: to a question about a clip that ends at a second."""

    def __init__(
        self,
        lines: Callable[[Item], Lines],
        reply: Callable[[Item, str, float], str],
        each_second: str = "",
    ) -> None:
        self.lines, self.reply, self.each_second = lines, reply, each_second
        self.questions: list[str] = []  # those of streams
        self.check_pictures = True  # of published.py's video

    @contextmanager
    def watch(self, item: Item) -> Iterator[Watching]:
        yield _Watching(self, self.lines(item))

    def answer(self, item: Item, question: str, frames: Iterable[Tensor], at: float) -> str:
        shown = [frame.float().mean().item() / 8 for frame in frames]
        # The last frame is the one before the end: nothing of the future is shown.
        last = min(-(-at // 1) - 1, 30)
        assert shown
        assert abs(shown[-1] - max(last, 0)) < 0.5, (item.id, at, shown)
        return self.reply(item, question, at)


class _Watching:
    def __init__(self, policy: Policy, lines: Lines) -> None:
        self._policy, self._waiting, self._turn = policy, sorted(lines), 0
        self._said: list[Emission] = []

    def ask(self, second: float, text: str) -> None:
        self._policy.questions.append(text)
        self._turn += 1

    def frame(self, second: float, picture: Tensor, question: str | None = None) -> None:
        if self._policy.check_pictures:
            assert abs(picture.float().mean().item() / 8 - int(second)) < 0.5
        if question is not None:
            self.ask(second, question)
        while self._waiting and self._waiting[0][0] <= second:
            self._say(second, self._waiting.pop(0)[1])
        if self._policy.each_second and self._turn:
            self._say(second, self._policy.each_second)

    def _say(self, second: float, text: str) -> None:
        self._said.append(Emission(second, text, second, self._turn, pieces=((second, text),)))

    def emissions(self) -> list[Emission]:
        return self._said

    def end(self) -> list[Emission]:
        return self._said


LATE = 3.0


def oracle() -> Policy:
    return Policy(script, perceived)


def late() -> Policy:
    return Policy(
        lambda item: [(second + LATE, text) for second, text in script(item)],
        lambda item, question, at: perceived(item, question, at - LATE),
    )


def silent() -> Policy:
    return Policy(lambda item: [], lambda item, question, at: "")


def always() -> Policy:
    """Says `A` after each frame, and `Yes` to every question about a clip."""
    return Policy(lambda item: [], lambda item, question, at: "Yes", "A")


def exact_judge(kind: str, question: str, reference: str, answer: str) -> Verdict:
    """`match`: the same text. `coverage`: all of the reference, or nothing."""
    right = reference == answer if kind == "match" else reference in answer
    return Verdict(right, (5.0 if kind == "match" else 2.0) * right)
