"""Watches a file, a camera or a stream live, and says what the model says, when it says it.

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
from pathlib import Path

if __name__ == "__main__":  # as a file: the folder of the package, not this one
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_pipeline.commands import CommandParser
from inference import cli
from inference.session.handle import SessionClosed, SessionHandle
from inference.session.runner import Runner
from inference.session.session import SessionConfig
from inference.session.view import View, summary
from inference.sources import Source, SourceError

PROGRAM = "python -m inference.realtime_streaming_infer"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(PROGRAM, description=__doc__)
    cli.add_engine_flags(parser)
    cli.flag(parser, "video_path", required=True,
             help="a file, the number of a camera, or an rtsp:// or http:// URL")  # fmt: skip
    cli.flag(parser, "prompt", default="", help="the first user turn; empty: watch until asked")
    cli.flag(parser, "ask", action="append", default=[], metavar="SECOND:TEXT", type=asked,
             help="ask in this second of the video; again for more")  # fmt: skip
    cli.flag(parser, "system_prompt", default="")
    cli.flag(parser, "max_new_tokens", type=int, default=512, help="of a response")
    cli.flag(parser, "fps", type=float, default=1.0, help="frames a second of the video")
    cli.flag(parser, "speed", type=float, default=1.0,
             help="times wall-clock pace; 0: a file as fast as possible")  # fmt: skip
    cli.flag(parser, "pace", type=pace, default=40,
             help="most tokens between two frames, or none")  # fmt: skip
    cli.flag(parser, "jsonl", help="write every event to this file; -: to the terminal instead")
    cli.add_sampling_flags(parser)
    return parser.parse_args(argv)


def asked(text: str) -> tuple[float, str]:
    """`12.5:Where is it?` -> (12.5, "Where is it?")"""
    second, colon, words = text.partition(":")
    try:
        return float(second), {":": words.strip()}[colon]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r}: write SECOND:TEXT") from None


def pace(text: str) -> int | None:
    return None if text == "none" else int(text)


def pace_of(args: argparse.Namespace, live: bool) -> float:
    """Seconds of the source in a second; 0: as fast as possible, which nothing live can be."""
    return float(args.speed or live)


def session_config(args: argparse.Namespace, live: bool) -> SessionConfig:
    """A live source drops what it cannot wait for. At speed 0 the video's clock is the only one."""
    if args.fps <= 0 or args.speed < 0:
        raise cli.CommandError("--fps must be more than 0, and --speed not less")
    speed = pace_of(args, live)
    return SessionConfig(
        system_prompt=args.system_prompt,
        prompt=args.prompt,
        sampling=cli.sampling(args),
        live=live,
        clock="wall" if speed else "media",
        pace=args.pace,
        frame_interval=1 / (args.fps * (speed or 1)),
        max_new_tokens=args.max_new_tokens,
    )


def feed(session: SessionHandle, source: Source, args: argparse.Namespace) -> None:
    """Gives the session its frames and questions, at the pace of the clock, then ends it."""
    questions = deque(sorted(args.ask))
    speed = pace_of(args, source.live)
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
        for second, picture in source.frames(args.fps):
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


def watch(session: SessionHandle, source: Source, args: argparse.Namespace) -> int:
    """Shows the session until it is over; the exit code: 1 where there was an error."""
    sink, view = cli.Sink(args.jsonl), View(sys.stdout)
    feeder = threading.Thread(target=feed, args=(session, source, args), daemon=True)
    feeder.start()
    failed, last = False, None
    for event in session.events():
        sink.show(event)
        if not sink.terminal:
            view.show(event)
        failed = failed or event.type == "error"
        last = event if event.type == "session.metrics" else last
    feeder.join()
    sink.close()
    if last:
        cli.note(summary(last))
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with cli.one_line_errors(PROGRAM):
        source = Source(args.video_path)
        source.check()
        config = session_config(args, source.live)
        cli.check_stage(args.checkpoint, realtime=True)
        engine = cli.load(args)
        with Runner(engine) as runner, runner.session(config) as session:
            return watch(session, source, args)


if __name__ == "__main__":
    raise SystemExit(main())
