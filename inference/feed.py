"""A source's frames, and questions about them, on their way into a session."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.schema import SampleError
from inference.live import LiveSource, Notice, SourceError
from inference.session.events import Event
from inference.session.handle import SessionClosed, SessionHandle
from inference.session.session import QueueFull
from inference.sources import FileSource

_ROOM = 0.05  # seconds between looks at whether a queue has room for a question
_PATIENCE = 1.0  # seconds for a source to notice that nobody watches: a camera may be silent


@dataclass(frozen=True)
class Schedule:
    """When a session is given its frames and questions.

    fps: frames per second of the source's own time.
    speed: seconds of the source per second of the wall clock; 0: the wall clock does not count.
    questions: (second of the source, text), in order.
    """

    fps: float
    speed: float
    questions: list[tuple[float, str]]

    def session_fields(self, live: bool) -> dict[str, Any]:
        """Fields of the session's SessionConfig.

        live: the source drops frames that nobody takes in time; else it waits.
        """
        interval = 1 / (self.fps * (self.speed or 1.0))
        clock = "wall" if self.speed else "media"
        return {"live": live, "clock": clock, "frame_interval": interval}


class Feeder:
    """Gives a session its frames and questions at their times, then ends its input."""

    def __init__(
        self, session: SessionHandle, source: FileSource | LiveSource, schedule: Schedule
    ) -> None:
        self._session, self._source, self._schedule = session, source, schedule
        self._questions = deque(schedule.questions)
        self._began = 0.0  # wall clock at second 0 of the source
        self._over = threading.Event()  # no more frames come

    def run(self) -> None:
        """Feeds the source to the session; to be called once. What is wrong with the source becomes
        an `error` event."""
        session, source = self._session, self._source
        try:
            last = self._live(source) if isinstance(source, LiveSource) else self._file(source)
            session.emit("source.ended", frame_at=last, questions=len(self._questions))
            while self._questions:
                # What is asked after the end is asked at the end.
                self._wait(min(self._questions[0][0], last + 1 / self._schedule.fps))
                self._ask_next()
            session.end()
        except SessionClosed:
            return
        except Exception as error:
            left = f" ({len(self._questions)} questions were not asked)" if self._questions else ""
            session.emit("error", code="source", message=f"{error}{left}")
            session.end()
            if not isinstance(error, SourceError):
                raise

    def _file(self, source: FileSource) -> float:
        """Frames wait for their time, and for room. Returns the second of the last one."""
        questions, second, any_frame = self._questions, 0.0, False
        for second, picture in source.frames(self._schedule.fps):
            self._began = self._began or time.monotonic()
            while questions and questions[0][0] < second:
                self._wait(questions[0][0])
                self._ask_next()
            self._wait(second)
            self._session.put_frame(picture, second, self._frame_prompt(second, any_frame))
            any_frame = True
        return second

    def _frame_prompt(self, second: float, any_frame: bool) -> str | None:
        """Asks the questions of a frame's second before the frame, each as a turn with an answer of
        its own, as in training. Before the first frame there is nothing to answer about: the last
        of its questions is returned, to be taken in with the frame."""
        questions = self._questions
        while questions and questions[0][0] == second:
            last = len(questions) == 1 or questions[1][0] > second
            if last and not any_frame:
                return questions.popleft()[1]
            self._ask_next(in_turn=True)
        return None

    def _live(self, source: LiveSource) -> float:
        """Frames come at their own time; questions are asked at theirs, also while the source is
        lost.

        Returns the second of the last frame.
        """
        session, second = self._session, 0.0
        asker = threading.Thread(target=self._ask_questions, name="moss-ask", daemon=True)
        try:
            for item in source.frames(self._schedule.fps, session.log.wait_closed):
                if isinstance(item, Notice):
                    session.emit(item.type, **item.data)
                    continue
                second, picture = item
                if not self._began:
                    self._began = time.monotonic()
                    while self._questions and self._questions[0][0] <= second:
                        self._ask_next()
                    asker.start()
                self._wait(second)  # in a burst they come before their time
                session.push_frame(picture, second)
        finally:
            self._over.set()
            if asker.ident:
                asker.join()
            source.close()
        return second

    def _ask_questions(self) -> None:
        with contextlib.suppress(SessionClosed):
            while self._questions:
                if self._over.wait(self._wall_time(self._questions[0][0]) - time.monotonic()):
                    return
                self._ask_next()

    def _ask_next(self, in_turn: bool = False) -> None:
        """Asks the next question, as soon as there is room for it. in_turn: after the frames that
        were given before, on the wall clock, too."""
        _, text = self._questions.popleft()
        at_once = self._schedule.speed and not in_turn
        put = self._session.prompt if at_once else self._session.put_prompt
        while True:
            try:
                return put(text)
            except QueueFull:
                self._session.log.wait_closed(_ROOM)
            except SampleError as error:  # the others are asked all the same
                return self._session.emit("error", code=error.reason, message=f"{text}: {error}")

    def _wall_time(self, second: float) -> float:
        """When it is this second of the source, on the wall clock."""
        return self._began + second / self._schedule.speed if self._schedule.speed else 0.0

    def _wait(self, second: float) -> None:
        """Waits until this second of the source, or until the session is closed."""
        self._session.log.wait_closed(self._wall_time(second) - time.monotonic())


def follow(
    session: SessionHandle, source: FileSource | LiveSource, schedule: Schedule
) -> Iterator[Event]:
    """Feeds the session in a thread, and yields its events until it is over."""
    feeder = threading.Thread(target=Feeder(session, source, schedule).run, daemon=True)
    feeder.start()
    yield from session.events()
    feeder.join(_PATIENCE)
