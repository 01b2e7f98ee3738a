"""python -m tools.shards ls|show|stats|validate

ls TREE                   every source with its shards, samples and size
show SOURCE KEY|NUMBER    a sample as it is trained on: labels, frames, token positions
stats TREE                samples, frames, tokens, silence, words a second, errors
validate TREE             checks everything; exit code 1 where something is wrong
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from data_pipeline.encode import EncodeConfig
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError, check_source, shard_files
from tools.shards.encoding import stage_encoding, stage_names
from tools.shards.find import find_sample, find_sources, indexed_counts
from tools.shards.show import show_sample
from tools.shards.stats import source_stats
from tools.shards.validate import validate_tree


def _table(rows: list[list[str]]) -> str:
    """Columns lined up, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def list_sources(tree: Path) -> int:
    rows = [["source", "shards", "samples", "MB", "index"]]
    for source in find_sources(tree):
        shards = shard_files(source)
        counts = indexed_counts(source)
        megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
        samples = str(sum(counts.values())) if counts else "?"
        rows.append([str(source), str(len(shards)), samples, f"{megabytes:.1f}", _state(source)])
    print(_table(rows))
    return 0


def _state(source: Path) -> str:
    try:
        check_source(source)
    except ShardError as error:
        return "stale" if "does not match" in str(error) else "missing"
    return "ok"


def show(given: argparse.Namespace) -> int:
    stored = find_sample(given.source, given.sample)
    color = given.color == "always" or (given.color == "auto" and sys.stdout.isatty())
    sheet = given.png or Path(f"{stored.key.replace('/', '_')}.png")
    print(show_sample(stored, _encoding(given), color=color, sheet=sheet))
    return 0


def stats(given: argparse.Namespace) -> int:
    found = source_stats(find_sources(given.tree), _encoding(given), given.workers)
    rows = {str(source): source_found.row() for source, source_found in found.items()}
    if given.json:
        print(json.dumps(rows, indent=2))
        return 0
    names = [name for name in next(iter(rows.values())) if name != "errors"]
    table = [["source", *names, "errors"]]
    for source, row in rows.items():
        errors = ", ".join(f"{reason} {count}" for reason, count in row["errors"].items())
        table.append([source, *(_cell(row[name]) for name in names), errors or "-"])
    print(_table(table))
    return 0


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def validate(given: argparse.Namespace) -> int:
    encoding = _encoding(given) if given.tokenizer else None
    samples, problems = validate_tree(given.tree, encoding, given.workers)
    for problem in problems:
        print(problem)
    print(f"{given.tree}: {samples} samples, {len(problems) or 'no'} problems")
    return 1 if problems else 0


def _encoding(given: argparse.Namespace) -> EncodeConfig:
    return stage_encoding(given.tokenizer, given.stage, given.tile_size, given.max_tiles)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls").add_argument("tree", type=Path)
    shown = commands.add_parser("show")
    shown.add_argument("source", type=Path)
    shown.add_argument("sample", help="a key, or a number from 0")
    shown.add_argument("--png", type=Path, help="where the frames go (default: KEY.png)")
    shown.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    counted, checked = commands.add_parser("stats"), commands.add_parser("validate")
    counted.add_argument("--json", action="store_true", help="as JSON")
    for each in (counted, checked):
        each.add_argument("tree", type=Path)
        each.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    for each in (shown, counted, checked):
        needed = each is not checked
        each.add_argument("--tokenizer", required=needed, help="folder with tokenizer.json")
        each.add_argument("--stage", default="sft", help=f"{', '.join(stage_names())} (sft)")
        each.add_argument("--tile-size", type=int, default=560, help="pixels (560)")
        each.add_argument("--max-tiles", type=int, default=1, help="tiles a frame (1)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        if given.command == "ls":
            return list_sources(given.tree)
        return {"show": show, "stats": stats, "validate": validate}[given.command](given)
    except (ShardError, SampleError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
