"""The clock of a live source: at which second of the stream is a frame that comes now?"""

from __future__ import annotations

_BACK = 0.2  # seconds by which stamps may go back: frames that were sent in another order
_LATE, _PATIENCE = 1.0, 5.0  # seconds that stamps may be behind the wall clock, and for how long
AHEAD = 2.0  # seconds by which stamps may jump ahead of the wall clock
_STORED = 30.0  # seconds in which every frame was there at once
_HURRY = 0.005  # the share of a second by which seconds then pass faster


class LiveClock:
    """Seconds of frames, rising, 0 at the first one.

    A source's own time stamps count as long as they go as the wall clock does: within a burst they
    say what is when. Where they jump, or stay behind for seconds, the frame's second is when it
    came (`jump` says so), and they go on from there. Without stamps it always is.

    A reader that waits for each frame's second falls behind a source whose clock is a little fast
    (a quartz may be by 1e-4: 1.4 s in four hours), or that begins with what it has stored. So where
    nothing of a source had to be waited for, seconds pass a little faster until something has.

    ahead: seconds by which a stamp may jump ahead of the wall clock.
    jump: seconds by which the last frame's stamp was off; 0.0: it was right.
    """

    def __init__(self, ahead: float = AHEAD) -> None:
        self._ahead = ahead
        self.jump = 0.0
        self._began: float | None = None  # wall clock at second 0
        self._second = 0.0  # of the last frame
        self._arrived_at = 0.0  # the last frame, on the wall clock
        self._stamp: float | None = None  # of the last frame that had one
        self._zero = 0.0  # stamp of second 0
        self._late: tuple[float, float] | None = None  # since when stamps are behind; by how much
        self._waited = 0.0  # when a frame last had to be waited for

    def second(self, stamp: float | None, now: float, waited: float | None = None) -> float:
        """The second of a frame that comes at `now` (monotonic seconds); `stamp`: its own time;
        `waited`: seconds for which the source let its reader wait for it; None: of no concern, as
        where the source is a file."""
        if self._began is None:
            self._began = self._waited = now
        passed = second = now - self._began
        self.jump = 0.0
        if stamp is not None and self._stamp is not None:
            step = stamp - self._stamp
            self._zero += self._hurry(step, now, waited)
            second = stamp - self._zero
            if not -_BACK <= step <= now - self._arrived_at + self._ahead:
                self.jump = step
            elif self._stays_behind(passed - second, now):
                self.jump = second - passed
            if self.jump:
                second = passed
        second = max(second, self._second)
        if stamp is not None and (self.jump or self._stamp is None):
            self._zero, self._late, self._waited = stamp - second, None, now
        self._stamp = stamp if stamp is not None else self._stamp
        self._arrived_at, self._second = now, second
        return second

    def passed(self, now: float) -> float | None:
        """Seconds since second 0; None: there was no frame yet."""
        return None if self._began is None else now - self._began

    def set(self, second: float, now: float) -> None:
        """Somebody else says the second of a frame; the seconds of further ones go on from it."""
        self._began, self._second, self._arrived_at = now - second, second, now

    def restart(self) -> None:
        """The source is a new one, with stamps of its own; the seconds go on."""
        self._stamp = self._late = None

    def _hurry(self, step: float, now: float, waited: float | None) -> float:
        """Seconds by which a frame, `step` after the last one, is earlier than its stamp says."""
        if waited is None or waited > step / 2:
            self._waited = now
        return _HURRY * (now - self._arrived_at) if now - self._waited > _STORED else 0.0

    def _stays_behind(self, lag: float, now: float) -> bool:
        """Whether stamps have been behind for long, and do not catch up as those of a burst do."""
        if lag < _LATE:
            self._late = None
            return False
        if self._late is None:
            self._late = now, lag
        since, first = self._late
        return now - since > _PATIENCE and lag > first - _BACK


class Grid:
    """Chooses `fps` frames a second among those that come."""

    def __init__(self, fps: float) -> None:
        self._fps, self._next_second, self._last = fps, 0.0, 0.0

    def take(self, second: float) -> float | None:
        """The second that a frame stands for, None for a frame that is not chosen.

        The frame that is nearest to a multiple of 1/fps: of a camera that sends one a second, and
        never exactly so, none is left out.
        """
        slack = min(second - self._last, 1 / self._fps) / 4
        self._last = second
        if second + slack < self._next_second - 1e-4:
            return None
        second = max(second, self._next_second)
        self._next_second = (int((second + 1e-4) * self._fps) + 1) / self._fps
        return second
