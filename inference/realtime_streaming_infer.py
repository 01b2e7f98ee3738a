"""Watches a file, a camera or a network stream live and prints what the model says.

python -m inference.realtime_streaming_infer --checkpoint DIR --video_path clip.mp4 --prompt ...
torchrun --nproc-per-node 2 inference/realtime_streaming_infer.py ...   (tensor parallel)
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # run as a file: imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_pipeline.commands import DONE, FAILED, CommandParser
from inference import cli
from inference.session.handle import SessionClosed, SessionHandle
from inference.session.runner import Runner
from inference.session.session import SessionConfig
from inference.session.view import View, summary
from inference.sources import Source, SourceError

PROGRAM = "python -m inference.realtime_streaming_infer"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    default = SessionConfig()
    parser = CommandParser(PROGRAM, description=__doc__)
    cli.add_engine_flags(parser)
    cli.flag(parser, "video_path", required=True, metavar="SOURCE",
             help="video file, number of a camera, or rtsp:// or http:// URL")  # fmt: skip
    cli.flag(parser, "prompt", default=default.prompt, metavar="TEXT",
             help="first user turn (default: none, the model watches first)")  # fmt: skip
    cli.flag(parser, "ask", action="append", default=[], metavar="SECOND:TEXT", type=question,
             help="ask TEXT in this second of the video; may be given again")  # fmt: skip
    cli.flag(parser, "system_prompt", default=default.system_prompt, metavar="TEXT",
             help="system prompt")  # fmt: skip
    cli.flag(parser, "fps", type=cli.positive, default=1 / default.frame_interval, metavar="N",
             help="frames per second of the video")  # fmt: skip
    cli.flag(parser, "speed", type=speed, default=1.0, metavar="X",
             help="seconds of the video per second of the wall clock; 0: as fast as possible "
             "(a file; a live source stays at 1)")  # fmt: skip
    cli.flag(parser, "pace", type=pace, default=default.pace, metavar="N",
             help="maximum number of tokens between two frames; none: no limit")  # fmt: skip
    cli.add_output_flags(parser)
    cli.add_sampling_flags(parser)
    return parser.parse_args(argv)


def question(text: str) -> tuple[float, str]:
    """`12.5:Where is it?` -> (12.5, "Where is it?")"""
    second, colon, words = text.partition(":")
    try:
        at = float(second)
    except ValueError:
        colon = ""
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: write SECOND:TEXT")
    return at, words.strip()


def speed(text: str) -> float:
    if not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"{text}: must not be less than 0")
    return float(text)


def pace(text: str) -> int | None:
    return None if text == "none" else cli.positive_int(text)


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

    @classmethod
    def of(cls, args: argparse.Namespace, live: bool) -> Schedule:
        """A live source cannot be faster than it is: its speed is never 0."""
        as_fast_as_possible = args.speed == 0 and not live
        speed = 0.0 if as_fast_as_possible else args.speed or 1.0
        return cls(args.fps, speed, sorted(args.ask))

    @property
    def frame_interval(self) -> float:
        """Seconds of the session's clock between two frames."""
        return 1 / (self.fps * (self.speed or 1.0))


def session_config(args: argparse.Namespace, schedule: Schedule, live: bool) -> SessionConfig:
    """A live source drops frames that nobody takes in time; a file waits."""
    return SessionConfig(
        system_prompt=args.system_prompt,
        prompt=args.prompt,
        sampling=cli.sampling(args),
        live=live,
        clock="wall" if schedule.speed else "media",
        pace=args.pace,
        frame_interval=schedule.frame_interval,
        max_new_tokens=args.max_new_tokens,
    )


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


def watch(session: SessionHandle, source: Source, schedule: Schedule, jsonl: str | None) -> int:
    """Shows the session until it is over; the exit code."""
    sink, view = cli.Sink(jsonl), View(sys.stdout)
    feeder = threading.Thread(target=feed, args=(session, source, schedule), daemon=True)
    feeder.start()
    code, last = DONE, None
    for event in session.events():
        sink.show(event)
        if not sink.terminal:
            view.show(event)
        code = FAILED if event.type == "error" else code
        last = event if event.type == "session.metrics" else last
    feeder.join()
    sink.close()
    if last:
        cli.note(summary(last))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with cli.one_line_errors(PROGRAM):
        source = Source(args.video_path)
        source.check()
        schedule = Schedule.of(args, source.live)
        config = session_config(args, schedule, source.live)
        cli.require_use(args, watching=True)
        with Runner(cli.load(args)) as runner, runner.session(config) as session:
            return watch(session, source, schedule, args.jsonl)


if __name__ == "__main__":
    raise SystemExit(main())
