"""Accounts: what each key has used and may use, and its sessions and requests from begin to end.

All of this runs in the event loop of the process that has the clients' sockets. With replicas that
is the front, so that a limit holds over all of them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from inference.serve.keys import Quota
from inference.serve.limits import Refused
from inference.serve.traces import Trace
from inference.session.events import EventLog

Kind = Literal["chat", "realtime"]
_SETTLED = 0.1  # seconds for which what sessions have used is not read again
LIMITED = "rate_limit_exceeded"  # OpenAI's code
_ENDS = {1000: "done", 1001: "closed", 1008: "refused", 1011: "failed", 1013: "refused"}


@dataclass(frozen=True)
class Usage:
    """input_tokens: given to the model, one for each frame among them. output_tokens: it said."""

    frames: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class Rate:
    """A limit of so many a second on average, and up to `burst` at once. What is spent beyond that
    must come back before more may be spent."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._at = burst, time.monotonic()

    def spend(self, count: float) -> None:
        self._left = self._now() - count

    def wait(self, least: float) -> float:
        """Seconds until so many may be spent; 0: now."""
        self._left = self._now()
        return max(0.0, least - self._left) / self._rate

    def _now(self) -> float:
        now = time.monotonic()
        left, self._at = self._left + (now - self._at) * self._rate, now
        return min(self._burst, left)


class LimitReached(NamedTuple):
    """A limit is used up for so many seconds."""

    seconds: float
    limit: str
    words: str


class Records(Protocol):
    """Keeps records of sessions and requests: audit log, metrics, traces."""

    def entered(self, visit: Visit, headers: Mapping[str, str]) -> None:
        """Records that a session or request begins; `headers`: those that its client sent."""

    def ended(self, visit: Visit, ended: str, code: int | str) -> None:
        """Records that a session or request is over. code: status of the HTTP answer or close code
        of the socket, or a word."""

    def turned_away(self, name: str | None, kind: Kind, code: str) -> None:
        """Records that a session or request was refused before it began. name: of its key; None: it
        has none."""


@dataclass(eq=False)
class Visit:
    """A session or a chat request of an account.

    id: as its client knows it. requested: what it asks for, as plain values, never its contents.
    reads: what it has used so far. code: why it was refused or failed, a word; empty: it was not.
    """

    account: Account
    kind: Kind
    began: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.time)  # seconds since the epoch
    id: str = ""
    requested: dict[str, Any] = field(default_factory=dict)
    reads: Callable[[], Usage] = Usage
    code: str = ""
    trace: Trace | None = None
    settled: Usage = field(default_factory=Usage)
    over: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def now(self) -> float:
        """Seconds since the epoch, by the clock as it was when the visit began: it may be set
        meanwhile."""
        return self.at + self.seconds

    def stage(self, name: str, began: float) -> float:
        """Adds a stage that ends now to the trace; returns the time. began: as `now` says it."""
        now = self.now
        if self.trace is not None:
            self.trace.add(name, began, now)
        return now

    def follow(self, log: EventLog, began: float) -> None:
        """Adds the log's events to the trace. began: as `now` says it."""
        if self.trace is not None:
            self.trace.follow(log, began, self.at - self.began - log.zero)

    def report_usage(self, usage: Usage) -> None:
        """Takes in the usage that another process counts. A count below the last one, as of a
        replica that began anew, is ignored."""
        before = self.reads()
        most = before.input_tokens + before.output_tokens
        if usage.input_tokens + usage.output_tokens >= most:
            self.reads = lambda: usage

    def end(self, status: int, *, whole: bool = True) -> None:
        """Ends the visit. status: of its HTTP answer, or the code that closes its socket. whole:
        the client has got all of it. Calling it twice is not an error."""
        if self.over:
            return
        ended = _ENDS.get(status, "closed")
        if self.kind == "chat":
            ended = "done" if status < 400 else "refused" if status < 500 else "failed"
            ended = "refused" if status == 503 else ended
            ended = "client_left" if status == 499 or not whole else ended
        self.account.leave(self, ended, status)


class Account:
    """The account of a key.

    Args:
        name: of the key.
        operator: may read what is told of all keys.
        front: it is a front, which counts for its clients and is told what they have used.
    """

    def __init__(
        self,
        name: str,
        quota: Quota,
        records: Records,
        *,
        operator: bool,
        front: bool = False,
    ) -> None:
        self.name, self.quota, self.operator, self.front = name, quota, operator, front
        self._records = records
        self.open: set[Visit] = set()
        self.used = Counter[str]()  # frames, input_tokens, output_tokens, of all visits
        self.seconds = 0.0  # of those that are over
        self.ended = Counter[tuple[Kind, str]]()
        self.refused = Counter[str]()  # by the limit
        rate, minute = quota.frames_per_second, quota.tokens_per_minute
        self._frames = Rate(rate, max(1.0, 2 * rate)) if rate else None
        self._tokens = Rate(minute / 60, minute) if minute else None
        self._settled_at = -math.inf

    @property
    def unlimited(self) -> bool:
        """Whether this account has no rates."""
        return self._frames is None and self._tokens is None

    def enter(self, kind: Kind, headers: Mapping[str, str]) -> Visit:
        """Begins a session or request that has sent these headers. Raises
        Refused(`rate_limit_exceeded`)."""
        late, most = self.limit_reached(frame=False), self.quota.sessions
        if most is not None and len(self.open) >= most:
            words = f"{len(self.open)} sessions and requests are open, of {most}"
            late = LimitReached(1.0, "sessions", f"key {self.name}: {words}")
        if late is not None:
            self.refused[late.limit] += 1
            self._records.turned_away(self.name, kind, LIMITED)
            raise Refused(LIMITED, late.words, retry=late.seconds)
        visit = Visit(self, kind)
        self.open.add(visit)
        self._records.entered(visit, headers)
        return visit

    def leave(self, visit: Visit, ended: str, status: int) -> None:
        """Ends a visit, as Visit.end says."""
        visit.over = True
        self._settle(visit)
        self.open.discard(visit)
        self.seconds += visit.seconds
        self.ended[visit.kind, ended] += 1
        self._records.ended(visit, ended, status)

    def limit_reached(self, *, frame: bool) -> LimitReached | None:
        """The limit for which a frame, or a question without one, must wait; None: there is
        none."""
        if self._tokens is not None:
            self.settle()
        rates = (("tokens_per_minute", self._tokens), ("frames_per_second", self._frames))
        for limit, rate in rates if frame else rates[:1]:
            seconds = 0.0 if rate is None else rate.wait(1)
            if seconds:
                most, name = getattr(self.quota, limit), limit.replace("_", " ")
                words = f"key {self.name}: more than {most:g} {name}: go on in {seconds:.1f} s"
                return LimitReached(seconds, limit, words)
        return None

    def take_frame(self) -> None:
        """A frame goes to the model."""
        if self._frames is not None:
            self._frames.spend(1)

    def settle(self) -> None:
        """Reads what open sessions and requests have used."""
        now = time.monotonic()
        if now - self._settled_at > _SETTLED:
            self._settled_at = now
            for visit in self.open:
                self._settle(visit)

    def _settle(self, visit: Visit) -> None:
        now, before = visit.reads(), visit.settled
        visit.settled = now
        self.used["frames"] += now.frames - before.frames
        self.used["input_tokens"] += now.input_tokens - before.input_tokens
        self.used["output_tokens"] += now.output_tokens - before.output_tokens
        if self._tokens is not None:
            output = now.output_tokens - before.output_tokens
            self._tokens.spend(now.input_tokens - before.input_tokens + output)
