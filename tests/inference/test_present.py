"""A command that is ended before its session: last events, summary, exit code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands import PIPE_CLOSED, STOPPED
from inference import feed, realtime_streaming_infer
from inference.live import LiveSource
from inference.present import Sink
from inference.session.events import Event
from tests.inference.cameras import camera, jpegs
from tests.samples import graded_video
from tests.waiting import until

TALK = ["--silence_bias=-100", "--pace=8", "--max_new_tokens=1000", "--device=cpu"]


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path) -> str:
    """So far."""
    return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def when(condition: Callable[[], bool], act: Callable[[], object]) -> Iterator[None]:
    """Acts in a thread once the condition holds; or after minutes, so that the block ends. Not
    where the block has ended before: a signal would meet another test."""
    over = threading.Event()

    def wait() -> None:
        with contextlib.suppress(AssertionError):
            until(lambda: over.is_set() or condition())
        if not over.is_set():
            act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_writes_its_last_events(
    number: int, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a camera, which has no other end, in the middle of a response."""
    log = tmp_path / "events.jsonl"
    before = signal.getsignal(number)
    with camera(jpegs(100_000, fps=20)) as made:
        args = ["--checkpoint", str(tiny), "--video_path", made.url, "--jsonl", str(log), *TALK]
        with when(
            lambda: "output_text.delta" in written(log),
            lambda: os.kill(os.getpid(), number),
        ):
            code = realtime_streaming_infer.main(args)
    assert code == STOPPED
    assert signal.getsignal(number) == before
    told = events(log)
    assert [event["type"] for event in told[-4:]] == [
        "response.done", "session.state", "session.metrics", "session.closed",
    ]  # fmt: skip
    assert (told[-4]["status"], told[-4]["reason"]) == ("cancelled", "session_closed")
    assert told[-1]["reason"] == "interrupted"
    kinds = [event["type"] for event in told]
    assert kinds.count("response.created") == kinds.count("response.done")
    shown = capsys.readouterr()
    assert "[session_closed]" in shown.out
    said = shown.err.splitlines()
    assert said[-2] == "interrupted"
    assert said[-1].startswith(f"{kinds.count('input_frame.processed')} frames, ")


def test_a_closed_pipe_ends_the_run_quietly(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `| head` does; the events in the file are whole."""
    log, clip, seconds = tmp_path / "events.jsonl", tmp_path / "clip.mp4", 31
    graded_video(clip, [float(second) for second in range(seconds)])
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        args = ["--checkpoint", str(tiny), "--video_path", str(clip), "--jsonl", str(log), *TALK]
        assert realtime_streaming_infer.main(args) == PIPE_CLOSED
    assert "error" not in capfd.readouterr().err
    told = events(log)
    assert told[-1]["type"] == "session.closed"
    assert told[-1]["reason"] == "nobody reads the output"
    assert sum(event["type"] == "input_frame.processed" for event in told) < seconds


def test_a_full_disk_is_an_error_that_names_the_file(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graded_video(tmp_path / "clip.mp4", [0.1, 0.2])
    args = ["--checkpoint", str(tiny), "--video_path", str(tmp_path / "clip.mp4"), *TALK]
    with pytest.raises(SystemExit) as stopped:
        realtime_streaming_infer.main([*args, "--jsonl", "/dev/full"])
    assert stopped.value.code == 1
    assert "/dev/full: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "problem"), [("none/a.jsonl", "there is no folder"), (".", "it is a folder")]
)
def test_a_file_that_cannot_be_written_is_refused_first(
    name: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything else is looked at."""
    args = ["--checkpoint", "none", "--video_path", "none", "--jsonl", str(tmp_path / name)]
    with pytest.raises(SystemExit) as stopped:
        realtime_streaming_infer.main(args)
    assert stopped.value.code == 2
    assert problem in capsys.readouterr().err


def test_questions_come_in_time_while_a_camera_is_away(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "events.jsonl"
    args = ["--checkpoint", str(tiny), "--jsonl", str(log), "--fps=5", "--device=cpu"]
    asks = ["--silence_bias=50", "--ask=0:Who?", "--ask=00:02:Where?", "--ask=2:00:30:Later?"]
    began: list[float] = []  # seconds since the epoch at which there was no frame yet
    live, ask = feed.Feeder._live, feed.Feeder._ask_next

    def noting(feeder: feed.Feeder, source: LiveSource) -> float:
        began.append(time.time())
        return live(feeder, source)

    def asking(feeder: feed.Feeder, in_turn: bool = False) -> None:
        """Before it is to be asked where, the camera has gone."""
        if feeder._questions[0][1] == "Where?":
            until(lambda: "source.lost" in written(log))
        ask(feeder, in_turn)

    monkeypatch.setattr(feed.Feeder, "_live", noting)
    monkeypatch.setattr(feed.Feeder, "_ask_next", asking)

    def serve(number: int, client: socket.socket) -> None:
        """The first connection breaks off after the first frame was seen."""
        with contextlib.ExitStack() as stack:
            if number == 1:
                breaking_off = when(
                    lambda: "input_frame.processed" in written(log),
                    lambda: client.shutdown(socket.SHUT_RDWR),
                )
                stack.enter_context(breaking_off)
            jpegs(100_000, fps=20)(number, client)

    with (
        camera(serve, away_after=1) as made,
        when(lambda: "Where?" in written(log), made.come_back),
        when(
            lambda: "source.back" in written(log),
            lambda: os.kill(os.getpid(), signal.SIGINT),
        ),
    ):
        assert realtime_streaming_infer.main([*args, *asks, "--video_path", made.url]) == STOPPED
    told = [event for event in events(log) if event["type"] != "session.metrics"]
    asked = {e["text"]: e for e in told if e["type"] == "conversation.item.created"}
    assert list(asked) == ["Who?", "Where?"]
    assert asked["Where?"]["t_server"] - began[0] >= 1.99  # two clocks
    kinds = [event["type"] for event in told]
    away = kinds[kinds.index("source.lost") : kinds.index("source.back")]
    assert "conversation.item.created" in away
    assert kinds[-1] == "session.closed"


def test_events_are_json_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    event = Event("response.done", 1, 0.0, 0.0, {"text": "日 \U0001f600"})
    for encoding in ("ascii", "utf-8"):
        shown = io.BytesIO()
        monkeypatch.setattr(
            sys, "stdout", io.TextIOWrapper(shown, encoding, errors="backslashreplace")
        )
        Sink("-").show(event)
        assert json.loads(shown.getvalue().decode(encoding))["text"] == "日 \U0001f600"
