"""A session of another process from its journal: its tokens and pictures go through the model
again (rebuilder.py)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from inference.engine import rebuild as engine_rebuild
from inference.engine.rebuild import Outline
from inference.engine.sampling import Sampling
from inference.session.events import LOG_LIMIT
from inference.session.handle import SessionHandle
from inference.session.journal import Journal, Record
from inference.session.rebuilder import Rebuilder
from inference.session.session_state import resume
from inference.session.stats import Stats


def rebuild(
    rebuilder: Rebuilder,
    kept: Record,
    pictures: Mapping[int, Tensor],
    *,
    reason: str = "",
    journal: Journal | None = None,
    log_limit: int = LOG_LIMIT,
) -> SessionHandle:
    """Goes on with a session whose records were folded into `kept`; waits until it can.

    Its next event, `session.resumed`, has the number after the last one of `kept`.

    Args:
        pictures: those of `journal.sources(kept)`.
        reason: of `session.resumed`.
        journal: the new one.

    Raises:
        EngineFull: no place is free.
        ValueError: the session is of an engine of other sizes, or of another program.
    """
    runner, state = rebuilder.runner, _state(kept["session"], pictures)
    stats, now, most = Stats(runner.measured), time.monotonic(), runner.engine.max_tokens // 2
    task = resume(state, runner.vocabulary, stats, now, most, log_limit)
    task.log.last_seq = kept["seq"]
    outline = _outline(kept.get("slot"))
    if outline is not None:
        engine_rebuild.check(runner.engine, outline)
    handle = runner.start(task, rebuilding=True)
    running = handle.running
    if journal is not None:
        journal.go_on(kept)
        running.journal = journal
    try:
        if outline is not None:
            images = [pictures[source] for source in kept["slot"]["ring"]["sources"]]
            running.slot = rebuilder.slot(outline, images)
        took = round(1000 * (time.monotonic() - now), 1)
        length = 0 if outline is None else len(outline.tokens)
        task.emit(
            "session.resumed", reason=reason, frames=len(pictures), tokens=length, rebuild_ms=took
        )
    except BaseException:
        handle.close("it could not be rebuilt")
        raise
    finally:
        with runner.changed:
            running.rebuilding = False
            runner.changed.notify_all()
    return handle


def _state(session: Record, pictures: Mapping[int, Tensor]) -> dict[str, Any]:
    """A saved session, with its pictures in their places."""

    def restored_frame(frame: list[Any]) -> tuple[Any, ...]:
        _, at, prompt, source = frame
        return pictures.get(source), at, prompt, source

    response, unfinished = session["response"], session["unfinished"]
    if unfinished:
        tokens, frame = unfinished
        unfinished = tokens, frame and restored_frame(frame)
    return {
        **session,
        "frames": [restored_frame(frame) for frame in session["frames"]],
        "response": response and (response["name"], response["tokens"]),
        "unfinished": unfinished,
    }


def _outline(slot: Record | None) -> Outline | None:
    if slot is None:
        return None
    names = ("tokens", "positions", "position", "pending", "window", "sinks")
    ring = slot["ring"]
    return Outline(
        sampling=Sampling(**slot["sampling"]),
        first=ring["first"],
        count=ring["count"],
        **{name: slot[name] for name in names},
    )
