"""Imports data of others, makes real-time samples of videos, and shows what is in shards.

`import` recognizes the form of SOURCE and says which it is. With --check it writes no shards: it
counts what would be skipped, by reason with three examples each, and writes a page with the first
samples as the model sees them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path

from data_pipeline.imports import uncollected

with uncollected():
    from data_pipeline import build
    from data_pipeline.cgroups import cores
    from data_pipeline.commands import (
        DONE,
        FAILED,
        STOPPED,
        WRONG_USAGE,
        CommandParser,
        describe,
        report_error,
        whole_number,
    )
    from data_pipeline.importers.archive import DAMAGE
    from data_pipeline.schema import SampleError
    from data_pipeline.shards import ShardError, shard_files
    from tools.data import synthesize
    from tools.data.check import check_source
    from tools.data.mixture import histogram, mixture, table
    from tools.data.page import toy_tokenizer, write_page
    from tools.shards.encoding import stage_encoding, stage_names
    from tools.shards.find import StoredSample, find_sources, stored_samples

PROGRAM = "moss-data"


def check(args: argparse.Namespace) -> int:
    options = build.options_of(args)
    checked = check_source(args.source, options, args.limit, args.samples)
    print("\n".join(checked.lines()))
    if checked.samples:
        _page(args, f"{args.source}: {checked.form}", checked.lines(), checked.samples, {})
    return DONE if checked.usable else FAILED


def show(args: argparse.Namespace) -> int:
    sources = find_sources(args.shards)
    first = _first(sources, args.samples)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = args.tokenizer or toy_tokenizer(Path(folder), first)
        config = stage_encoding(tokenizer, args.stage, args.tile_size, args.max_tiles)
        by_source = mixture(sources, config, args.workers)
        text = table(by_source, args.length or config.sequence_length)
    print(text)
    panels = {str(source): histogram(counts.lengths) for source, counts in by_source.items()}
    _page(args, str(args.shards), text.splitlines(), first, panels)
    return DONE if any(counts.samples for counts in by_source.values()) else FAILED


def _first(sources: list[Path], most: int) -> list[StoredSample]:
    """The first samples of each source, together `most`."""
    each = -(-most // len(sources))
    first: list[StoredSample] = []
    for source in sources:
        try:
            first += islice(stored_samples(shard_files(source)[0]), each)
        except DAMAGE:
            continue
    return [stored for stored in first if stored.error is None and "json" in stored.parts][:most]


def _page(
    args: argparse.Namespace,
    title: str,
    facts: list[str],
    samples: list[StoredSample],
    panels: dict[str, str],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if not args.tokenizer:
            facts = [*facts, "tokens of a toy tokenizer: give --tokenizer"]
        tokenizer = args.tokenizer or toy_tokenizer(Path(folder), samples)
        config = stage_encoding(tokenizer, args.stage, args.tile_size, args.max_tiles)
        write_page(args.page, title, facts, samples, config, panels)
    print(f"{len(samples)} samples as the model sees them: {args.page}")


def import_(args: argparse.Namespace) -> int:
    if args.check:
        return check(args)
    if args.out is None:
        raise ValueError("OUT is missing: the folder of the shards (or give --check)")
    return build.run(args, PROGRAM)


def _parser() -> CommandParser:
    parser = CommandParser(PROGRAM, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    imported = commands.add_parser("import", help="data of others -> shards", description=__doc__)
    build.add_options(imported, out="?")
    add = imported.add_argument
    add("--check", action="store_true", help="write no shards: count what would be skipped")
    add("--limit", type=whole_number(above=0), metavar="N", help="check the first N records alone")
    shown = commands.add_parser("show", help="samples, frames, tokens of each source of shards")
    shown.add_argument("shards", type=Path, metavar="SHARDS", help="folder with shards below it")
    shown.add_argument("--length", type=whole_number(above=0), metavar="TOKENS",
                       help="length of packed microbatches (default: the stage's)")  # fmt: skip
    shown.add_argument(
        "--workers",
        type=whole_number(least=0),
        default=cores(),
        metavar="N",
        help="processes; 0: this one (default: one a core)",
    )
    made = commands.add_parser("synthesize", help="videos -> real-time samples, by models",
                               description=synthesize.__doc__)  # fmt: skip
    synthesize.add_options(made)
    for each in (imported, shown):
        add = each.add_argument
        add("--tokenizer", help="folder with tokenizer.json (default: a toy one, of the samples)")
        add("--stage", default="realtime_sft", choices=stage_names(), help="stage to encode for")
        add("--tile-size", type=whole_number(above=0), default=560, help="side of a tile in pixels")
        add("--max-tiles", type=whole_number(above=0), default=1, help="tiles of a frame at most")
        add("--samples", type=whole_number(above=0), default=5, metavar="N", help="on the page")
        add("--page", type=Path, default=Path("samples.html"), metavar="FILE",
            help="page of the first samples")  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        if args.command == "synthesize":
            return synthesize.synthesize(args, parser.prog)
        return {"import": import_, "show": show}[args.command](args)
    except (ShardError, SampleError) as error:
        return report_error(parser.prog, error)
    except ValueError as error:
        return report_error(parser.prog, error, WRONG_USAGE)
    except OSError as error:
        return report_error(parser.prog, describe(error), WRONG_USAGE)
    except KeyboardInterrupt:
        return report_error(parser.prog, "stopped", STOPPED)


if __name__ == "__main__":
    sys.exit(main())
