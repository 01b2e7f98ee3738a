"""A source's frames, and questions about them, on their way into a session."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from inference.session.events import Event
from inference.session.handle import SessionClosed, SessionHandle
from inference.sources import Source, SourceError


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


def feed(session: SessionHandle, source: Source, schedule: Schedule) -> None:
    """Gives the session its frames and questions at their times, then ends its input."""
    questions, speed = deque(schedule.questions), schedule.speed
    began = time.monotonic()
    give = session.push_frame if source.live else session.put_frame
    ask = session.prompt if speed else session.put_prompt

    def wait(second: float) -> None:
        due = began + second / speed if speed else 0.0
        session.log.wait_closed(due - time.monotonic())

    def ask_until(second: float) -> None:
        while questions and questions[0][0] < second:
            wait(questions[0][0])
            ask(questions.popleft()[1])

    try:
        for second, picture in source.frames(schedule.fps):
            ask_until(second)
            wait(second)
            together = questions and questions[0][0] == second
            give(picture, second, questions.popleft()[1] if together else None)
        ask_until(math.inf)
        session.end()
    except SessionClosed:
        return
    except Exception as error:
        session.emit("error", code="source", message=str(error))
        session.end()
        if not isinstance(error, SourceError):
            raise


def follow(session: SessionHandle, source: Source, schedule: Schedule) -> Iterator[Event]:
    """Feeds the session in a thread, and yields its events until it is over."""
    feeder = threading.Thread(target=feed, args=(session, source, schedule), daemon=True)
    feeder.start()
    yield from session.events()
    feeder.join()
