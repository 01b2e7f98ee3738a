"""Watches a file, a camera or a network stream live and prints what the model says.

python -m inference.realtime_streaming_infer --checkpoint DIR --video_path clip.mp4 --prompt ...
torchrun --nproc-per-node 2 inference/realtime_streaming_infer.py ...   (tensor parallel)
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_pipeline.imports import uncollected

with uncollected():
    from data_pipeline.commands import CommandParser, finite_number, whole_number
    from data_pipeline.seconds import clock, is_time, parse_seconds
    from data_pipeline.stores import without_secrets
    from inference import cli
    from inference.engine.sampling import Sampling
    from inference.feed import Schedule, follow
    from inference.live import LiveSource
    from inference.present import Sink, present
    from inference.session.events import Event
    from inference.session.runner import Runner
    from inference.session.session import SessionConfig
    from inference.session.view import View, summary
    from inference.sources import RECONNECT, open_source

PROGRAM = "python -m inference.realtime_streaming_infer"
# As much as may be a time, a colon (ASCII or full-width), the text.
_QUESTION = re.compile(
    r"\s*(\d[\d.]*(?:[:\uff1a]\d[\d.]*)*\s*s?|[^:\uff1a]*?)\s*[:\uff1a](.*)", re.DOTALL
)
_MORE_TIME = re.compile(r"\d\d(?:\.\d+)?(?!\d)")  # at the start of a text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    default = SessionConfig()
    parser = CommandParser(PROGRAM, description=__doc__)
    cli.add_engine_flags(parser)
    cli.flag(parser, "video_path", required=True, metavar="SOURCE",
             help="video file, number of a camera, rtsp:// or http:// URL, -: stdin")  # fmt: skip
    cli.flag(parser, "prompt", default=default.prompt, metavar="TEXT",
             help="first user turn (default: none, the model watches first)")  # fmt: skip
    cli.flag(parser, "ask", action="append", default=[], metavar="SECOND:TEXT", type=question,
             help="ask TEXT at this time of the video: 3, 12.5, 00:03 or 1:02:03; may be given "
             "again")  # fmt: skip
    cli.flag(parser, "system_prompt", default=default.system_prompt, metavar="TEXT",
             help="system prompt")  # fmt: skip
    cli.flag(parser, "fps", type=finite_number(above=0), default=1 / default.frame_interval,
             metavar="N", help="frames per second of the video")  # fmt: skip
    cli.flag(parser, "speed", type=finite_number(least=0), default=1.0, metavar="X",
             help="seconds of a file per second of the wall clock; 0: as fast as possible (a live "
             "source has a speed of its own)")  # fmt: skip
    cli.flag(parser, "reconnect", type=finite_number(least=0), default=RECONNECT, metavar="SECONDS",
             help="seconds for which a camera or stream that is lost is tried again; 0: it is "
             "not")  # fmt: skip
    cli.flag(parser, "pace", type=pace, default=default.pace, metavar="N",
             help="maximum number of tokens between two frames; none: no limit")  # fmt: skip
    cli.add_output_flags(parser)
    cli.add_sampling_flags(parser)
    return parser.parse_args(argv)


def question(text: str) -> tuple[float, str]:
    """`12.5:Where is it?` -> (12.5, "Where is it?"); the time in all forms of `parse_seconds`."""
    match = _QUESTION.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: write SECOND:TEXT")
    time, words = match[1], match[2]
    try:
        second = parse_seconds(time)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not words.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no text after the time {time}")
    digits = _MORE_TIME.match(words)
    if digits and is_time(f"{time}:{digits[0]}"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: the time may be {time} or {time}:{digits[0]}: write "
            f"'{time}: {words.strip()}' or '{time}:{digits[0]}:TEXT'"
        )
    return second, words.strip()


def pace(text: str) -> int | None:
    return None if text == "none" else whole_number(above=0)(text)


def schedule_of(args: argparse.Namespace, live: bool) -> Schedule:
    """A live source has a speed of its own, which is 1."""
    if live and args.speed not in (0, 1):
        name = without_secrets(args.video_path)
        cli.note(f"--speed {args.speed:g}: {name} is live and has a speed of its own")
    for second, text in args.ask:
        cli.note(f"asked at {clock(second)} ({second:g} s): {text}")
    return Schedule(args.fps, 1.0 if live else args.speed, sorted(args.ask, key=itemgetter(0)))


def session_config(
    args: argparse.Namespace, sampling: Sampling, fields: Mapping[str, Any]
) -> SessionConfig:
    """`fields`: what follows from the source and its speed."""
    return SessionConfig(
        system_prompt=args.system_prompt,
        prompt=args.prompt,
        sampling=sampling,
        pace=args.pace,
        max_new_tokens=args.max_new_tokens,
        **fields,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with cli.one_line_errors(PROGRAM):
        Sink.check(args.jsonl)
        cli.require_use(args, watching=True)
        sampling = cli.sampling(args)
        if not cli.leads():
            cli.load(args)  # follows rank 0 until that is done
        source = open_source(args.video_path, args.reconnect, cli.note)
        schedule = schedule_of(args, source.live)
        config = session_config(args, sampling, schedule.session_fields(source.live))
        if isinstance(source, LiveSource):
            source.skip()
        with Runner(cli.load(args)) as runner, runner.session(config) as session:
            events = follow(session, source, schedule)
            return present(session, events, args.jsonl, View(sys.stdout).show, conclude)


def conclude(newest: Mapping[str, Event]) -> None:
    cli.note(summary(newest["session.metrics"]))


if __name__ == "__main__":
    raise SystemExit(main())
