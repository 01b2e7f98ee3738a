"""Measures many live sessions at once: how fast each speaks, how late decisions on frames come."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import PreTrainedTokenizerFast

from data_pipeline.progress import Progress
from data_pipeline.tokens import build_toy_tokenizer
from inference.engine.engine import Engine
from inference.engine.sampling import Sampling
from inference.session.handle import SessionHandle
from inference.session.runner import Runner

SPEAKS = -1e4  # bias of `<|silence|>` with which a model is never silent
LIVE = 10**6  # second of the first live frame, by which live frames are told from earlier ones
PATIENCE_S = 60  # how long the last frames' decisions are waited for
EVENTS = 10**6  # size of a session's event log: all events are kept
PLAIN_WORDS = ["A man walks in and sits down. Who is it?"]


@dataclass
class ServedTimings:
    """Measurements of all sessions."""

    rates: list[float]  # tokens/s of each session
    decisions: list[float]  # seconds from each frame's arrival to its decision
    dropped: int  # frames

    @property
    def rate(self) -> float:
        """The median session's tokens/s."""
        return statistics.median(self.rates)


def plain_processor(vocabulary: int) -> SimpleNamespace:
    """A processor that is a tokenizer of so many tokens alone, for a model of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = build_toy_tokenizer(folder, PLAIN_WORDS, vocabulary)
        return SimpleNamespace(tokenizer=PreTrainedTokenizerFast.from_pretrained(path))


def served(
    engine: Engine, *, sessions: int, seen: int, seconds: int, fps: float = 1.0
) -> ServedTimings:
    """Streams to `sessions` sessions at once, all of which speak without end.

    Args:
        seen: frames that each session gets before the clock starts.
        seconds: how long is measured.
        fps: frames a second of each session. Frames of all sessions are evenly spread in time, as
            those of independent viewers are.
    """
    size = engine.pixels.size
    frame = torch.randint(0, 255, (3, size, size), dtype=torch.uint8)
    sampling = Sampling(silence_bias=SPEAKS)
    with Runner(engine) as runner:
        opened = [
            runner.session(
                log_limit=EVENTS, sampling=sampling, pace=None, max_new_tokens=None,
                frame_interval=1 / fps, max_waiting_frames=max(4, seen),
            )
            for _ in range(sessions)
        ]  # fmt: skip
        for session in opened:
            for _ in range(seen):
                session.push_frame(frame)
        _wait(opened, seen)
        return _measured(opened, frame, seconds, fps)


def _wait(sessions: list[SessionHandle], seen: int) -> None:
    """Waits until each session has seen so many frames."""
    progress, before = Progress("frames seen first", seen * len(sessions), "frames"), 0
    while before < seen * len(sessions):
        time.sleep(0.1)
        now = sum(session.stats()["frames"] for session in sessions)
        progress.step(now - before)
        before = now
        _check(sessions)
    progress.end()


def _check(sessions: list[SessionHandle]) -> None:
    """Raises RuntimeError for a session that has ended."""
    for session in sessions:
        if session.reason:
            raise RuntimeError(session.reason)


def _measured(
    sessions: list[SessionHandle], frame: torch.Tensor, seconds: int, fps: float
) -> ServedTimings:
    tokens_before = [session.stats()["tokens"] for session in sessions]
    count, start = round(seconds * fps * len(sessions)), time.perf_counter()
    progress = Progress("live", count, "frames")
    for number in range(count):
        time.sleep(max(0.0, start + number / (fps * len(sessions)) - time.perf_counter()))
        sessions[number % len(sessions)].push_frame(frame, LIVE + number)
        progress.step()
    progress.end()
    time.sleep(max(0.0, start + seconds - time.perf_counter()))
    took = time.perf_counter() - start
    tokens = [session.stats()["tokens"] for session in sessions]
    decisions, dropped = _decided(sessions, count)
    return ServedTimings(
        rates=[(now - before) / took for now, before in zip(tokens, tokens_before, strict=True)],
        decisions=decisions,
        dropped=dropped,
    )


def _decided(sessions: list[SessionHandle], count: int) -> tuple[list[float], int]:
    """Waits until each live frame is decided on or dropped. Returns the seconds from each frame's
    arrival to its decision, and the number of dropped frames."""
    until = time.perf_counter() + PATIENCE_S
    while True:
        events = [e for session in sessions for e in session.log.after(0, EVENTS)]
        live = [e for e in events if e.data.get("frame_at", 0) >= LIVE]
        decided = [e.data for e in live if e.type == "input_frame.processed"]
        dropped = sum(e.data["count"] for e in live if e.type == "input_frame.dropped")
        if len(decided) + dropped == count:
            return [(data["lag_ms"] + data["decision_ms"]) / 1000 for data in decided], dropped
        _check(sessions)
        if time.perf_counter() > until:
            left = count - len(decided) - dropped
            raise RuntimeError(f"{left} frames have no decision {PATIENCE_S} s after the end")
        time.sleep(0.1)
