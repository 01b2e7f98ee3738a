"""Builds shards on one or many machines, and looks into them: lists, shows, counts, checks.

A source is one folder of shards; a TREE is a folder with sources anywhere below it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from data_pipeline.imports import uncollected

with uncollected():
    from data_pipeline.cgroups import cores
    from data_pipeline.commands import (
        WRONG_USAGE,
        CommandParser,
        describe,
        report_error,
        whole_number,
    )
    from data_pipeline.encode import EncodeConfig
    from data_pipeline.schema import SampleError
    from data_pipeline.shards import ShardError, check_source, shard_files
    from data_pipeline.tables import format_table
    from tools.shards import build
    from tools.shards.encoding import stage_encoding, stage_names
    from tools.shards.find import find_sample, find_sources, indexed_counts
    from tools.shards.show import show_sample
    from tools.shards.stats import source_stats
from tools.shards.validate import validate_tree


def list_sources(tree: Path) -> int:
    rows = [["source", "shards", "samples", "MB", "index"]]
    for source in find_sources(tree):
        shards = shard_files(source)
        counts = indexed_counts(source)
        megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
        samples = str(sum(counts.values())) if counts else "?"
        rows.append([str(source), str(len(shards)), samples, f"{megabytes:.1f}", _state(source)])
    print(format_table(rows))
    return 0


def _state(source: Path) -> str:
    try:
        check_source(source)
    except ShardError as error:
        return "stale" if "does not match" in str(error) else "missing"
    return "ok"


def show(args: argparse.Namespace) -> int:
    stored = find_sample(args.source, args.sample)
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    sheet = args.png or Path(f"{stored.key.replace('/', '_')}.png")
    print(show_sample(stored, _encoding(args), color=color, sheet=sheet))
    return 0


def stats(args: argparse.Namespace) -> int:
    by_source = source_stats(find_sources(args.tree), _encoding(args), args.workers)
    rows = {str(source): stats.row() for source, stats in by_source.items()}
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    names = [name for name in next(iter(rows.values())) if name != "errors"]
    table = [["source", *names, "errors"]]
    for source, row in rows.items():
        errors = ", ".join(f"{reason} {count}" for reason, count in row["errors"].items())
        table.append([source, *(_cell(row[name]) for name in names), errors or "-"])
    print(format_table(table))
    return 0


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def validate(args: argparse.Namespace) -> int:
    encoding = _encoding(args) if args.tokenizer else None
    samples, problems = validate_tree(args.tree, encoding, args.workers)
    for problem in problems:
        print(problem)
    print(f"{args.tree}: {samples} samples, {len(problems) or 'no'} problems")
    return 1 if problems else 0


def _encoding(args: argparse.Namespace) -> EncodeConfig:
    return stage_encoding(args.tokenizer, args.stage, args.tile_size, args.max_tiles)


def _parser() -> CommandParser:
    parser = CommandParser("python -m tools.shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    built = commands.add_parser(
        "build", help="data of others -> shards, on one or many machines", description=build.__doc__
    )
    build.add_options(built)
    listed = commands.add_parser("ls", help="every source with its shards, samples and size")
    shown = commands.add_parser(
        "show", help="a sample as it is trained on: labels, frames, token positions"
    )
    counted = commands.add_parser(
        "stats", help="samples, frames, tokens, silence, words a second, errors of every source"
    )
    checked = commands.add_parser(
        "validate", help="checks index, schema and media; exit code 1 where something is wrong"
    )
    shown.add_argument("source", type=Path, metavar="SOURCE", help="folder of shards")
    shown.add_argument("sample", metavar="SAMPLE", help="a key, or a number from 0")
    shown.add_argument("--png", type=Path, help="picture of the frames (default: KEY.png)")
    shown.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="labels in colour"
    )
    counted.add_argument("--json", action="store_true", help="print JSON, not a table")
    for each in (listed, counted, checked):
        each.add_argument("tree", type=Path, metavar="TREE", help="folder with sources below it")
    for each in (counted, checked):
        each.add_argument(
            "--workers", type=whole_number(least=0), default=cores(), metavar="N",
            help="processes; 0: this one (default: one a core)",
        )  # fmt: skip
    for each in (shown, counted, checked):
        _add_encoding_options(each, required=each is not checked)
    return parser


def _add_encoding_options(parser: argparse.ArgumentParser, required: bool) -> None:
    tokenizer = "folder with tokenizer.json"
    if not required:
        tokenizer += "; encodes every sample, too (default: does not)"
    parser.add_argument("--tokenizer", required=required, help=tokenizer)
    parser.add_argument(
        "--stage", default="sft", choices=stage_names(), help="training stage to encode for"
    )
    parser.add_argument(
        "--tile-size", type=whole_number(above=0), default=560, help="side of a tile in pixels"
    )
    parser.add_argument(
        "--max-tiles", type=whole_number(above=0), default=1, help="tiles of a frame at most"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        if args.command == "ls":
            return list_sources(args.tree)
        if args.command == "build":
            return build.build_in_parts(args, parser.prog)
        return {"show": show, "stats": stats, "validate": validate}[args.command](args)
    except (ShardError, SampleError) as error:
        return report_error(parser.prog, error)
    except ValueError as error:
        return report_error(parser.prog, error, WRONG_USAGE)
    except OSError as error:
        return report_error(parser.prog, describe(error))


if __name__ == "__main__":
    sys.exit(main())
