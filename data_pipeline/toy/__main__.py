"""Renders the toy world into shards of text, pictures and videos, with a tokenizer."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from data_pipeline.imports import uncollected

with uncollected():
    from data_pipeline.commands import (
        WRONG_USAGE,
        CommandParser,
        describe,
        report_error,
        whole_number,
    )
    from data_pipeline.shards import ShardError
    from data_pipeline.toy.build import STAGES, ToyConfig, build_toy

HELP = {
    "train": "training samples of each modality of each stage",
    "heldout": "held-out samples of each modality of each stage",
    "seed": "seed of the worlds",
    "size": "side of pictures and videos in pixels, even",
    "fps": "frames a second of the videos",
    "samples_per_shard": "samples of a shard",
    "vocab_size": "tokens of the tokenizer",
    "stages": "training stages to make data for",
}


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m data_pipeline.toy", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the data set")
    for option in fields(ToyConfig):
        flag, words = f"--{option.name.replace('_', '-')}", HELP[option.name]
        if option.name == "stages":
            parser.add_argument(flag, nargs="+", choices=STAGES, default=STAGES, help=words)
        else:
            parser.add_argument(flag, type=int, default=option.default, metavar="N", help=words)
    parser.add_argument(
        "--workers",
        type=whole_number(above=0),
        default=2,
        metavar="N",
        help="processes that render",
    )
    options = vars(parser.parse_args(arguments))
    out, workers = options.pop("out"), options.pop("workers")
    options["stages"] = tuple(options["stages"])
    try:
        manifest = build_toy(out, ToyConfig(**options), workers)
    except ShardError as error:
        return report_error(parser.prog, error)
    except OSError as error:
        return report_error(parser.prog, describe(error))
    except ValueError as error:
        return report_error(parser.prog, error, WRONG_USAGE)
    for source, size in manifest["sources"].items():
        print(f"{out / source}: {size['samples']} samples, {size['bytes'] / 1e6:.1f} MB")
    print(f"{out / 'tokenizer'}, {out / 'toy.json'} (built in {manifest['seconds']} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
