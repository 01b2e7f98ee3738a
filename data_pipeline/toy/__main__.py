"""python -m data_pipeline.toy OUT [--train N] [--heldout N] [--seed N] [--workers N] ..."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from data_pipeline.shards import ShardError
from data_pipeline.toy.build import STAGES, ToyConfig, build_toy


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="data_pipeline.toy", description="Renders the toy data set into shards."
    )
    parser.add_argument("out", type=Path)
    for option in fields(ToyConfig):
        flag = f"--{option.name.replace('_', '-')}"
        if option.name == "stages":
            parser.add_argument(flag, nargs="+", default=STAGES, metavar="STAGE")
        else:
            parser.add_argument(flag, type=int, default=option.default)
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    options = vars(parser.parse_args(arguments))
    out, workers = options.pop("out"), options.pop("workers")
    options["stages"] = tuple(options["stages"])
    try:
        manifest = build_toy(out, ToyConfig(**options), workers)
    except (ShardError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for source, size in manifest["sources"].items():
        print(f"{out / source}: {size['samples']} samples, {size['bytes'] / 1e6:.1f} MB")
    print(f"{out / 'tokenizer'}, {out / 'toy.json'} (built in {manifest['seconds']} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
