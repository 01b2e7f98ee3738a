"""`moss-data synthesize`: real-time samples of videos, written and checked by models.

VIDEOS is a video or a folder of them; beside `talk.mp4` may be its words (`talk.srt`, `.vtt`,
whisper's `talk.json`) and what is known of it (`talk.txt`). The models answer at --url, an
OpenAI-compatible server (vLLM, SGLang, hosted ones). OUT gets

    OUT/shards/           indexed shards of real-time samples
    OUT/records.jsonl     the same as records in Streamo's form
    OUT/rejected.jsonl    what was not taken, and why
    OUT/report.html       both, counted by reason, with examples
    OUT/replies.sqlite    every reply: a second run sends nothing that was answered before

A run that was stopped, or ended at --budget (exit code 130), goes on with the same command.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import yaml

from data_pipeline.commands import DONE, STOPPED, one_line, report_error, whole_number
from data_pipeline.fields import ALLOWED
from data_pipeline.synthesis.config import ROLES, SynthesisConfig, config_from

HELP = {
    "url": "of the server, up to /v1",
    "model": "name of the model that sees pictures",
    "text_url": "of the server for requests without pictures (default: that of --url)",
    "text_model": "model for requests without pictures (default: that of --model)",
    "api_key_env": "environment variable with the key; it may be missing",
    "json_form": "how JSON is asked for; auto goes on to the next form where one is refused",
    "concurrency": "requests at a time",
    "timeout": "seconds of a request",
    "retries": "of a request, after the first try",
    "backoff": "seconds before the first retry, doubled each time",
    "max_wait": "seconds before a retry at most, if the server does not say",
    "temperature": "of all requests",
    "max_tokens": "of a reply",
    "image_tokens": "of a frame, for the estimate and the budget",
    "clip": "seconds of a clip at most: longer videos are cut",
    "shortest": "seconds of a clip at least",
    "window": "seconds that are captioned together",
    "frame_side": "longer side in pixels of the frames that are sent",
    "frames": "of a request at most; of more the older ones are thinned out",
    "roles": "kinds of samples",
    "per_role": "samples of each kind that are asked for, for each clip",
    "pace": "words that are said in a second",
    "lead": "votes by which yes or no must lead",
    "most_votes": "votes after which a question is undecided",
    "recaptions": "of a window whose caption is not confirmed",
    "silences": "seconds of silence of a sample that are checked",
    "similar": "share of common words from which two questions about a clip are one",
    "price_in": "of 10^6 tokens of prompts",
    "price_out": "of 10^6 tokens of replies",
    "budget": "in the currency of the prices, of all runs into OUT (default: no limit)",
    "samples_per_shard": "samples of a shard",
    "shard_size": "size of a shard in MB",
    "max_side": "encode videos with a longer side anew, at this size (default: as they are)",
    "video_fps": "encode faster videos anew, at this rate (default: as they are)",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="VIDEOS", help="video or folder, path or URL")
    add("out", metavar="OUT", type=Path, help="folder of the results; an unfinished one goes on")
    add("--config", type=Path, metavar="FILE", help="YAML with the fields below in their groups: "
        "endpoint, cut, write, check, output; flags override it")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="templates of all requests (default: ours, "
        "data_pipeline/synthesis/prompts.yaml)")  # fmt: skip
    add("--estimate", action="store_true", help="print what it would cost, and send nothing")
    add("--examples", type=whole_number(least=0), default=3, metavar="N",
        help="accepted samples of each role, rejected of each reason, on the page")  # fmt: skip
    defaults = SynthesisConfig()
    for group, part in vars(defaults).items():
        options = parser.add_argument_group(group)
        hints = get_type_hints(type(part))
        for entry in fields(part):
            _add_field(options, entry.name, hints[entry.name], entry.metadata.get(ALLOWED),
                       getattr(part, entry.name))  # fmt: skip


def _add_field(options: Any, name: str, hint: Any, allowed: Any, default: Any) -> None:
    """Adds a flag that is absent from the result where it is not given: the file may have the
    field."""
    flag, text = f"--{name.replace('_', '-')}", HELP[name]
    more: dict[str, Any] = {"default": argparse.SUPPRESS}
    if isinstance(default, tuple):
        more |= {"nargs": "+", "choices": ROLES}
        text += " (default: all)"
    elif isinstance(allowed, tuple):
        more["choices"] = allowed
    else:
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        more["type"] = next(kind for kind in kinds if kind is not type(None))
    if "(default" not in text and default not in ("", None):
        text += f" (default: {default})"
    options.add_argument(flag, help=text, **more)


def config_of(args: argparse.Namespace) -> SynthesisConfig:
    """The configuration of --config and the flags. Raises ValueError for a wrong value."""
    values: Any = {}
    if args.config is not None:
        try:
            values = yaml.safe_load(args.config.read_text()) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{args.config}: cannot be read: {one_line(error)}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{args.config}: expected groups of fields, as endpoint: {{...}}")
    config = config_from(values)
    for group, part in vars(config).items():
        flags = {n: tuple(v) if isinstance(v, list) else v for n, v in vars(args).items()
                 if n in {entry.name for entry in fields(part)}}  # fmt: skip
        config = replace(config, **{group: replace(part, **flags)})
    return config


def synthesize(args: argparse.Namespace, program: str) -> int:
    """Runs the command; returns the exit code."""
    config = config_of(args)
    config.check_endpoint()
    # Late: the other commands need none of it.
    from data_pipeline.synthesis.cut import find_sources
    from data_pipeline.synthesis.endpoint import EndpointError
    from data_pipeline.synthesis.estimate import estimate
    from data_pipeline.synthesis.outcomes import fingerprint, make_outcomes
    from data_pipeline.synthesis.prompts import load_prompts
    from data_pipeline.synthesis.store import Store
    from data_pipeline.synthesis.write import samples, write
    from tools.data.synthesis_page import write_report

    templates = load_prompts(args.prompts)
    sources = find_sources(args.source)
    if args.estimate:
        print("\n".join(estimate(sources, config, templates).lines(config)))
        return DONE
    store = Store(args.out)
    try:
        marks = {source: fingerprint(source, config, templates) for source in sources}
        new = [source for source, mark in marks.items() if not store.finished(source.path, mark)]
        if new:
            print("\n".join(estimate(new, config, templates).lines(config)), flush=True)
        done = asyncio.run(make_outcomes(sources, store, config, templates))

        def outcome_of(source: Any) -> Any:
            return store.outcome(source.path, marks[source])

        written = write(args.out, sources, outcome_of, config)
        examples = samples(sources, outcome_of)
        write_report(args.out, examples, done, written, store.usage(), config, args.examples)
    except EndpointError as error:
        return report_error(program, f"{error}. What is done is kept: the same command goes on")
    finally:
        store.close()
    return _ended(args.out, done, written, program)


def _ended(out: Path, done: Any, written: Any, program: str) -> int:
    for (role, reason), count in sorted(written.rejected.items()):
        print(f"rejected, {role or 'video'}, {reason}: {count}")
    for note, count in sorted(written.notes.items()):
        print(f"noted, {note}: {count}")
    for role, count in written.accepted.items():
        print(f"{role}: {count} samples")
    print(f"{done.videos} videos: {written.accepted.total()} samples, "
          f"{written.rejected.total()} rejected; {out / 'report.html'}")  # fmt: skip
    for path, why in list(done.failed.items())[:5]:
        print(f"{path}: not finished: {why}", file=sys.stderr)
    if done.stopped:
        return report_error(program, "the budget is reached; what is done is kept, and the same "
                            "command with a larger --budget goes on", STOPPED)  # fmt: skip
    if done.failed:
        return report_error(program, f"{len(done.failed)} videos are not finished, as requests "
                            "failed: the same command tries them again")  # fmt: skip
    if not written.accepted:
        return report_error(program, f"no sample was accepted: {out / 'report.html'} says why")
    return DONE
