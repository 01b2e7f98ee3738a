"""Watches a file, a camera or a network stream live and prints what the model says.

python -m inference.realtime_streaming_infer --checkpoint DIR --video_path clip.mp4 --prompt ...
torchrun --nproc-per-node 2 inference/realtime_streaming_infer.py ...   (tensor parallel)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_pipeline.commands import DONE, FAILED, CommandParser
from inference import cli
from inference.feed import Schedule, follow
from inference.session.handle import SessionHandle
from inference.session.runner import Runner
from inference.session.session import SessionConfig
from inference.session.view import View, summary
from inference.sources import Source

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


def schedule_of(args: argparse.Namespace, live: bool) -> Schedule:
    """A live source cannot be faster than it is: its speed is never 0."""
    as_fast_as_possible = args.speed == 0 and not live
    speed = 0.0 if as_fast_as_possible else args.speed or 1.0
    return Schedule(args.fps, speed, sorted(args.ask))


def session_config(args: argparse.Namespace, schedule: Schedule, live: bool) -> SessionConfig:
    return SessionConfig(
        system_prompt=args.system_prompt,
        prompt=args.prompt,
        sampling=cli.sampling(args),
        pace=args.pace,
        max_new_tokens=args.max_new_tokens,
        **schedule.session_fields(live),
    )


def watch(session: SessionHandle, source: Source, schedule: Schedule, jsonl: str | None) -> int:
    """Shows the session until it is over; the exit code."""
    sink, view = cli.Sink(jsonl), View(sys.stdout)
    code, last = DONE, None
    for event in follow(session, source, schedule):
        sink.show(event)
        if not sink.terminal:
            view.show(event)
        code = FAILED if event.type == "error" else code
        last = event if event.type == "session.metrics" else last
    sink.close()
    if last:
        cli.note(summary(last))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with cli.one_line_errors(PROGRAM):
        source = Source(args.video_path)
        source.check()
        schedule = schedule_of(args, source.live)
        config = session_config(args, schedule, source.live)
        cli.require_use(args, watching=True)
        with Runner(cli.load(args)) as runner, runner.session(config) as session:
            return watch(session, source, schedule, args.jsonl)


if __name__ == "__main__":
    raise SystemExit(main())
