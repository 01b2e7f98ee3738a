"""Defines what can be evaluated, a speaker, and the one that is a model in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from data_pipeline.fields import check_values, choice, number
from inference.api import Model
from inference.engine.images import fit
from inference.engine.sampling import Sampling
from inference.evaluate.streaming.items import Emission, Item
from inference.session.events import Event
from inference.session.handle import SessionClosed, SessionHandle
from inference.session.session import PromptTooLong, QueueFull


class SpeakerFailed(Exception):
    """A model or server cannot go on. `fatal`: no other item can be asked, either."""

    def __init__(self, why: str, fatal: bool) -> None:
        super().__init__(why)
        self.fatal = fatal


class Watching(Protocol):
    """A stream that a speaker watches."""

    def ask(self, second: float, text: str) -> None:
        """Gives a user's turn, at a second of the source, after the frames shown so far."""
        ...

    def frame(self, second: float, picture: Tensor, question: str | None = None) -> None:
        """Shows the frame of a second, uint8 [3, H, W]. `question`: a turn right before it."""
        ...

    def emissions(self) -> list[Emission]:
        """All responses so far, also one that is not finished."""
        ...

    def end(self) -> list[Emission]:
        """Ends the stream; all responses, once the last one is finished."""
        ...


class Speaker(Protocol):
    """What is evaluated: it watches streams, and answers questions about clips."""

    def watch(self, item: Item) -> AbstractContextManager[Watching]:
        """Opens a stream for an item. Raises SpeakerFailed, also while the stream is open."""
        ...

    def answer(self, item: Item, question: str, frames: Iterable[Tensor], at: float) -> str:
        """The answer to a question about a clip that ends at second `at` of the source."""
        ...


@dataclass(frozen=True)
class SpeakingConfig:
    """How a model watches. Fields are those of SessionConfig and Sampling, but for `fps`."""

    # `media`: as fast as the machine can; `wall`: each second of the video takes a second.
    clock: Literal["media", "wall"] = choice("media", ("media", "wall"))
    fps: float = number(1.0, above=0)  # frames a second of the video
    pace: int = number(40, above=0)  # tokens between two frames
    max_new_tokens: int = number(512, above=0)
    silence_bias: float = number(0.0, least=-100, most=100)
    system_prompt: str = ""

    def __post_init__(self) -> None:
        check_values(self)


class ModelSpeaker:
    """A speaker that is an export, opened in this process."""

    def __init__(self, model: Model, config: SpeakingConfig) -> None:
        self._model, self._config = model, config

    @contextmanager
    def watch(self, item: Item) -> Iterator[Watching]:
        config = self._config
        wall = config.clock == "wall"
        with self._explained():
            session = self._model.session(
                live=wall,
                clock=config.clock,
                frame_interval=1 / config.fps,
                pace=config.pace,
                max_new_tokens=config.max_new_tokens,
                system_prompt=config.system_prompt,
                sampling=Sampling(silence_bias=config.silence_bias),
            )
        with session, self._explained():
            yield _Session(session, item.start, wall)

    def answer(self, item: Item, question: str, frames: Iterable[Tensor], at: float) -> str:
        tile = self._model.runner.tile
        pictures = [fit(frame, tile) for frame in frames]
        try:
            with self._explained():
                return self._model.chat(
                    question,
                    video=pictures,
                    system_prompt=self._config.system_prompt,
                    max_new_tokens=self._config.max_new_tokens,
                )
        except ValueError as error:  # the question does not fit: not a fault of the video
            raise SpeakerFailed(str(error), fatal=False) from None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns the errors of a session or a failed engine, and of questions that are too long, or
        more than may wait on the wall clock, into SpeakerFailed."""
        try:
            yield
        except (PromptTooLong, QueueFull) as error:
            raise SpeakerFailed(str(error), fatal=False) from None
        except (SessionClosed, RuntimeError) as error:
            try:
                self._model.runner.call(int)
            except SessionClosed as end:  # the engine has stopped
                raise SpeakerFailed(str(end), fatal=True) from None
            raise SpeakerFailed(str(error), fatal=False) from None


class ResponseCollector:
    """Collects a session's responses, with their seconds, from its events.

    Args:
        start: second of the source from which it is shown.
        wall: seconds are those at which words came, not those of the newest frame.
        now: the clock of the events' `t_server`.
    """

    def __init__(self, start: float, wall: bool, now: Callable[[], float]) -> None:
        self._start, self._wall, self._now = start, wall, now
        # When second `start` of the source was shown: on that clock, and on the monotonic clock.
        self._began: float | None = None
        self._moment = 0.0
        self.turn_seconds: list[float] = []  # second of each user's turn
        self._turn = 0  # turns that the session has taken in
        self._done: list[Emission] = []
        self._pieces: list[tuple[float, str]] | None = None  # of the response under way
        self._second = 0.0  # at which that began

    @property
    def speaking(self) -> bool:
        """Whether a response is under way."""
        return self._pieces is not None

    def emissions(self) -> list[Emission]:
        """All responses so far, also one that is not finished."""
        running = [] if self._pieces is None else [self._emission(self._pieces, cut=False)]
        return [e for e in [*self._done, *running] if e.text.strip()]

    def note_frame(self, second: float, question: str | None) -> None:
        """Notes that the frame of a second is about to be shown, with a question or None."""
        if self._began is None:
            self._began, self._moment = self._now(), time.monotonic()
        if question is not None:
            self.turn_seconds.append(second)

    def seconds_until(self, second: float) -> float:
        """Seconds of the wall clock until one of the source is due."""
        if self._began is None:
            return 0.0
        return max(0.0, self._moment + second - self._start - time.monotonic())

    def add(self, event: Event) -> None:
        """Takes an event in. Raises SessionClosed for one that is an error."""
        at, data = self._at(event), event.data
        if event.type == "conversation.item.created":
            self._turn += 1
        elif event.type == "response.created":
            self._pieces, self._second = [], at
        elif event.type == "response.output_text.delta" and self._pieces is not None:
            self._pieces.append((at, data["delta"]))
        elif event.type == "response.done" and self._pieces is not None:
            cut = data["status"] != "completed"
            self._done.append(self._emission(self._pieces, cut))
            self._pieces = None
        elif event.type == "error":
            raise SessionClosed(str(data.get("message")))

    def _emission(self, pieces: list[tuple[float, str]], cut: bool) -> Emission:
        text = "".join(text for _, text in pieces)
        end = pieces[-1][0] if pieces else self._second
        return Emission(self._second, text, end, self._turn, cut, tuple(pieces))

    def _at(self, event: Event) -> float:
        """The second of the source at which an event came."""
        if not self._wall or self._began is None:
            # An answer is never earlier than its question, whatever frame is the newest.
            return max(event.t_media, self._start, *self.turn_seconds[self._turn - 1 : self._turn])
        return self._start + event.t_server - self._began


class _Session:
    """A stream that a model watches in a session. On the media clock each call waits until the
    session has taken in all input."""

    def __init__(self, session: SessionHandle, start: float, wall: bool) -> None:
        self._session, self._wall = session, wall
        self._seq, self._responses = 0, ResponseCollector(start, wall, session.log.now)

    def ask(self, second: float, text: str) -> None:
        self._responses.turn_seconds.append(second)
        if self._wall:
            self._wait(second)
            return self._session.prompt(text)
        self._session.put_prompt(text)
        self._session.settle()

    def frame(self, second: float, picture: Tensor, question: str | None = None) -> None:
        self._responses.note_frame(second, question)
        if self._wall:
            self._wait(second)
            self._session.push_frame(picture, second, question)
        else:
            self._session.put_frame(picture, second, question)
            self._session.settle()

    def _wait(self, second: float) -> None:
        """Waits on the wall clock until a second of the source is due."""
        self._session.log.wait_closed(self._responses.seconds_until(second))

    def emissions(self) -> list[Emission]:
        while events := self._session.log.after(self._seq):
            self._take(events)
        return self._responses.emissions()

    def end(self) -> list[Emission]:
        self._session.end()
        self._take(self._session.events(self._seq))
        if self._session.failed:
            raise SessionClosed(self._session.reason)
        return self.emissions()

    def _take(self, events: Iterable[Event]) -> None:
        for event in events:
            self._responses.add(event)
            self._seq = event.seq
