"""What another process needs to go on with a session whose own process dies: written after each
step and each message, read by who keeps it (`fold`), and given to `from_journal.rebuild`.

A record is whole in itself: it names the last event and the last message that it covers, and what
has changed of the session since the record before. Records hold plain values for JSON; pictures,
uint8 [3, tile, tile], go beside them, each under the number of the message that brought it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import Tensor

from inference.engine.slots import Slot
from inference.session.session import Session, SessionConfig
from inference.session.session_state import state_of

Record = dict[str, Any]


class Journal:
    """The journal of one session. All methods are called under the lock of the session's Runner.

    Args:
        window, sinks: of the engine.
    """

    def __init__(self, window: int, sinks: int) -> None:
        self._sizes = {"window": window, "sinks": sinks}
        self.wake: Callable[[], None] = _nothing  # is called when there is something to read
        self.last_message = 0  # number of the last message whose effects are all there
        self.connection: dict[str, Any] = {}  # what the server knows of the session's input
        # Pictures that are not written yet, and written ones that are not read yet: a picture goes
        # with the record that names it, for the reader forgets those that no record names.
        self._new: dict[int, Tensor] = {}
        self._pictures: dict[int, Tensor] = {}
        self._sources: dict[int, int] = {}  # message that brought a frame, by the frame's position
        self._record: Record | None = None  # not read yet
        self._config: SessionConfig | None = None  # what the reader knows
        self._tokens, self._last = 0, -1  # of the slot: how many, and the position of the last
        self._frames = -1  # that have come in all
        self._written_response: tuple[str, int] = ("", 0)  # response, and its tokens

    def go_on(self, kept: Record) -> None:
        """Goes on after the records that another process has written."""
        self.last_message, self.connection = kept["taken"], dict(kept["connection"])
        ring = kept.get("slot", {}).get("ring", {"first": [], "sources": []})
        self._sources = dict(zip(ring["first"], ring["sources"], strict=True))

    def add_picture(self, message: int, picture: Tensor) -> None:
        self._new[message] = picture

    def add_frame(self, position: int, message: int) -> None:
        """Notes which message brought a frame that the model has seen now."""
        self._sources[position] = message

    def write(self, task: Session, slot: Slot | None) -> None:
        """Adds a record of all that has changed; to be called between two steps of the session."""
        self._pictures.update(self._new)
        self._new.clear()
        state = state_of(task, pictures=False)
        record: Record = {
            "seq": task.log.last_seq,
            "taken": self.last_message,
            "connection": dict(self.connection),
            "session": {**state, "response": self._response(state["response"])},
        }
        if task.config is self._config:
            del record["session"]["config"]
        self._config = task.config
        if slot is not None:
            record["slot"] = self._slot(slot)
        if self._record is None:
            self._record = record
        else:
            fold(self._record, record)
        self.wake()

    def read(self) -> tuple[Record, dict[int, Tensor]] | None:
        """What was written since the last time, and the pictures that came with it."""
        record, self._record = self._record, None
        if record is None:
            return None
        pictures, self._pictures = self._pictures, {}
        return record, pictures

    def _slot(self, slot: Slot) -> Record:
        written = self._tokens
        if written and (written > slot.length or slot.positions[written - 1] != self._last):
            written = 0  # text was dropped
        self._tokens = slot.length
        self._last = slot.positions[-1] if slot.positions else -1
        sampling = asdict(slot.sampling)
        part: Record = {
            "from": written,
            "tokens": slot.tokens[written:],
            "positions": slot.positions[written:],
            "position": slot.position,
            "pending": slot.pending,
            "sampling": sampling,
            **self._sizes,
        }
        if slot.ring.count != self._frames:
            self._frames = slot.ring.count
            first = slot.ring.first[: slot.ring.used]
            self._sources = {at: self._sources[at] for at in first}
            sources = [self._sources[at] for at in first]
            part["ring"] = {"first": first, "count": slot.ring.count, "sources": sources}
        return part

    def _response(self, response: tuple[str, list[int]] | None) -> Record | None:
        if response is None:
            return None
        name, tokens = response
        written = self._written_response[1] if self._written_response[0] == name else 0
        self._written_response = (name, len(tokens))
        return {"name": name, "from": written, "tokens": tokens[written:]}


def _nothing() -> None:
    pass


def fold(kept: Record, record: Record) -> None:
    """Adds a record to those before it."""
    before = kept.get("session", {})
    now = {**before, **record["session"]}
    if now["response"] is not None:
        now["response"] = _longer(before.get("response"), now["response"], ("tokens",))
    slot = kept.get("slot")
    if "slot" in record:
        slot = _longer(slot, record["slot"], ("tokens", "positions"))
    kept.update(record)
    kept["session"] = now
    if slot is not None:
        kept["slot"] = slot


def sources(kept: Record) -> set[int]:
    """The messages whose pictures the session still needs."""
    session = kept["session"]
    needed = set(kept.get("slot", {}).get("ring", {}).get("sources", ()))
    frames = [*session["frames"], *(session["unfinished"] or [None])[1:]]
    return needed | {source for _, _, _, source in filter(None, frames) if source}


def _longer(before: Record | None, now: Record, lists: tuple[str, ...]) -> Record:
    """`now`, with lists that go on from those before."""
    together = {**(before or {}), **now}
    if now["from"]:
        assert before is not None
        for name in lists:
            kept = before[name]
            del kept[now["from"] - before["from"] :]
            kept += now[name]
            together[name] = kept
        together["from"] = before["from"]
    return together
