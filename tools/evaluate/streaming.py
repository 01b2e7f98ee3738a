"""`moss-eval --suite streaming`: benchmarks of streams, in their official protocols and push mode.

    moss-eval --suite streaming --checkpoint EXPORT --out OUT \\
        --benchmark ovobench=OVO-Bench --videos src_videos
    moss-eval --suite streaming --checkpoint EXPORT --out OUT --toy-events 20 --biases -2 0 2

A run that was stopped goes on with the same command; what the model has said is not asked again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from data_pipeline import devices
from data_pipeline.commands import CommandParser, report_error, whole_number
from data_pipeline.fields import ALLOWED
from data_pipeline.shards import ShardError
from inference.engine.load import DTYPES
from inference.engine.quantized_linear import KINDS as QUANTIZED
from inference.evaluate.results import BenchmarkError
from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.forms import FormError
from inference.evaluate.streaming.selection import BENCHMARKS
from inference.evaluate.streaming.suite import NAME, run
from inference.evaluate.streaming.toy import write_toy_events
from inference.export_info import ExportError

HELP = {
    "benchmarks": f"NAME=PATH: a file of questions, or a folder of them; {', '.join(BENCHMARKS)}",
    "videos": "folder of the videos (default: that of the file of questions)",
    "tasks": "rows that are asked, by a part of their names (default: all)",
    "protocol": "official protocols, push mode, or both",
    "limit": "items of each row (default: all)",
    "context": "seconds before a question that are watched; 0: all",
    "patience": "seconds after a question in which an answer may begin",
    "within": "seconds in which an event is told in time",
    "max_frames": "of a clip in the official protocols; of more as many, spread evenly",
    "sessions": "streams at a time",
    "biases": "of <|silence|>: an operating curve over the events",
    "url": "http(s)://HOST:PORT of a server that runs, in place of --checkpoint",
    "url_key_env": "environment variable with the server's API key; it may be missing",
    "prompts": "YAML with words in place of ours (inference/evaluate/streaming/prompts.yaml)",
    "clock": "media: as fast as it goes; wall: a second of the video in a second",
    "fps": "frames a second",
    "pace": "tokens between two frames",
    "max_new_tokens": "of a response or an answer",
    "silence_bias": "added to the logit of <|silence|>; above 0 the model speaks less",
    "system_prompt": "of all sessions and answers (default: none)",
}
# Fields of the judge's endpoint that are flags, too.
JUDGE = {
    "url": "of the judge's server, up to /v1",
    "model": "name of the judge (default: none, rows that need one are left out)",
    "api_key_env": "environment variable with the judge's key; it may be missing",
    "concurrency": "requests to the judge at a time",
}


def parser() -> CommandParser:
    made = CommandParser("moss-eval --suite streaming", description=__doc__)
    add = made.add_argument
    add("--suite", choices=[NAME], required=True, help="this suite")
    add("--checkpoint", metavar="DIR", help="exported folder of a real-time model")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    add("--toy-events", type=whole_number(above=0), metavar="N",
        help="write N videos of the toy world into OUT/toy, ask about their events")  # fmt: skip
    add("--toy-interruptions", type=whole_number(), default=0, metavar="N",
        help="of these videos so many have a question while an event is told")  # fmt: skip
    add("--device", default="auto", help=devices.HELP)
    add("--dtype", choices=list(DTYPES),
        help="dtype of weights (default: the checkpoint's on CUDA, fp32 on a CPU)")  # fmt: skip
    add("--quantize", choices=QUANTIZED, help="quantize the decoder's linear layers")
    config = StreamingConfig()
    _add_fields(made, config, HELP)
    _add_fields(made, config.speaking, HELP)
    _add_fields(made, config.judge, JUDGE, "judge-")
    return made


def _add_fields(made: CommandParser, part: Any, words: Mapping[str, str], before: str = "") -> None:
    hints = get_type_hints(type(part))
    for entry in fields(part):
        if entry.name not in words:
            continue
        name = "benchmark" if entry.name == "benchmarks" else entry.name.replace("_", "-")
        default, hint = getattr(part, entry.name), hints[entry.name]
        more: dict[str, Any] = {"default": default}
        if isinstance(entry.metadata.get(ALLOWED), tuple):
            more["choices"] = entry.metadata[ALLOWED]
        elif get_origin(hint) in (tuple, list):
            more |= {"nargs": "+", "type": get_args(hint)[0], "metavar": name.upper()}
        else:
            kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            more["type"] = next(kind for kind in kinds if kind is not type(None))
            more["metavar"] = "N" if more["type"] is int else "X"
        made.add_argument(f"--{before}{name}", help=words[entry.name],
                          dest=f"{before}{entry.name}", **more)  # fmt: skip


def config_of(args: argparse.Namespace) -> StreamingConfig:
    """The configuration of the flags. Raises ValueError for a value out of its range."""
    values = vars(args)
    default = StreamingConfig()
    own = {n: values[n] for n in (f.name for f in fields(default)) if n in values}
    own |= {n: tuple(own[n]) for n in ("benchmarks", "tasks")}
    speaking = {entry.name: values[entry.name] for entry in fields(default.speaking)}
    judge = {name: values[f"judge-{name}"] for name in JUDGE}
    return replace(
        default,
        **own,
        speaking=replace(default.speaking, **speaking),
        judge=replace(default.judge, **judge),
    )


def main(arguments: list[str]) -> int:
    """Evaluates, prints the table; returns 1 where not all items could be asked."""
    made = parser()
    args = made.parse_args(arguments)
    if bool(args.checkpoint) == bool(args.url):
        made.error("give --checkpoint DIR, or --url URL")
    cut = args.toy_interruptions
    if cut > (args.toy_events or 0):
        made.error(f"--toy-interruptions {cut}: are more than --toy-events {args.toy_events or 0}")
    if not (args.benchmarks or args.toy_events):
        made.error("give --benchmark or --toy-events")
    try:
        config = config_of(args)
    except ValueError as error:
        made.error(str(error))
    try:
        if args.toy_events:
            path = write_toy_events(args.out / "toy", args.toy_events, interruptions=cut)
            config = replace(config, benchmarks=(*config.benchmarks, f"events={path}"))
        engine = {"device": args.device, "dtype": args.dtype, "quantize": args.quantize}
        results = run(args.checkpoint or "", args.out, config, **engine)
    except (FormError, BenchmarkError, ExportError, ShardError, ValueError) as error:
        return report_error(made.prog, error)
    print(results.text())
    print(args.out / "results.html")
    return results.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
