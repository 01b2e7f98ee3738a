"""Makes the index that energon needs to read a folder of shards, as `energon prepare` does.

A folder of shards can be loaded once it has one. data_pipeline.build makes it by itself.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path

from megatron.energon import CrudeWebdataset

from data_pipeline.commands import CommandParser, report_error, whole_number
from data_pipeline.shards import (
    INDEX_FOLDER,
    INDEX_MARK,
    ShardError,
    SourceInfo,
    check_source,
    shard_files,
)

_DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


def prepare_index(path: str | Path, workers: int = 2) -> SourceInfo:
    """(Re)builds the index of a folder; every shard goes to the `train` split.

    `workers` processes read the shards. Raises ShardError for a missing folder, no shards, an
    unreadable tar or a key that occurs twice.
    """
    folder = Path(path)
    names = [shard.name for shard in shard_files(folder)]
    shutil.rmtree(folder / INDEX_FOLDER, ignore_errors=True)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            CrudeWebdataset.prepare_dataset(
                folder.absolute(),
                names,
                split_parts_ratio=[("train", 1.0), ("val", 0.0), ("test", 0.0)],
                shuffle_seed=None,
                workers=min(workers, len(names)),
            )
    except SystemExit:  # energon prints and exits where a key occurs twice
        raise ShardError(f"{folder}: {output.getvalue().strip()[:300]}") from None
    except Exception as error:
        raise ShardError(f"{folder}: the shards cannot be indexed: {error}") from error
    (folder / INDEX_FOLDER / INDEX_MARK).write_text(_DATASET)
    return check_source(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m data_pipeline.index", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, metavar="FOLDER", help="folder of shards")
    parser.add_argument(
        "--workers", type=whole_number(above=0), default=2, help="processes that read the shards"
    )
    options = parser.parse_args(arguments)
    try:
        for folder in options.folder:
            info = prepare_index(folder, options.workers)
            print(f"{folder}: {info.samples} samples in {info.shards} shards")
    except ShardError as error:
        return report_error(parser.prog, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
