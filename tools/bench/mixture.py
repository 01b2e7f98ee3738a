"""Measures the speed of `moss-data show` beside reading the same tars.

Shards of pictures and clips, as tools.bench.data makes them, are counted in this process, and read
by webdataset without decoding anything; both take turns, from the page cache, and are measured in
seconds of this process's CPU time, which other work on the machine does not stretch.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import webdataset

from data_pipeline.commands import DONE, CommandParser, whole_number
from data_pipeline.shards import shard_files, write_shards
from data_pipeline.tables import format_table
from data_pipeline.tokens import build_toy_tokenizer
from tools.bench.data import TEXT, clip, samples
from tools.data.mixture import mixture
from tools.shards.encoding import stage_encoding

PROGRAM = "python -m tools.bench.mixture"
# Media, their kind, and the noise of a camera in them.
KINDS = (("pictures", "image", 0), ("small clips", "video", 12), ("clips", "video", 32))


def repeated(kind: str, grain: int, count: int) -> Iterator[dict[str, Any]]:
    """Yields `count` samples that share the media of five."""
    made = list(samples(kind, 5))
    if grain:
        made = [one | {"0.mp4": clip(seed, grain=grain)} for seed, one in enumerate(made)]
    yield from (made[n % 5] | {"__key__": f"{kind}-{n:05d}"} for n in range(count))


def timed(work: Callable[[], int]) -> float:
    """Samples a second of CPU time."""
    began = time.process_time()
    count = work()
    return count / (time.process_time() - began)


def compare(folder: Path, tokenizer: str, rounds: int) -> tuple[float, float, float]:
    """Samples a second of reading and of counting, and the median of their ratios."""
    urls = [str(shard) for shard in shard_files(folder)]
    config = stage_encoding(tokenizer, "pt1", 560, 1)

    def read() -> int:
        return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))

    def count() -> int:
        return mixture([folder], config, 0)[folder].samples

    speeds: dict[Callable[[], int], list[float]] = {read: [], count: []}
    for work in speeds:  # what only a first call does
        work()
    for number in range(rounds):
        for work in [*speeds][:: 1 if number % 2 == 0 else -1]:
            speeds[work].append(timed(work))
    pairs = list(zip(speeds[read], speeds[count], strict=True))
    ratio = statistics.median(ours / plain for plain, ours in pairs)
    reading, counting = (statistics.median(column) for column in zip(*pairs, strict=True))
    return reading, counting, ratio


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(PROGRAM, description=__doc__)
    number = whole_number(above=0)
    parser.add_argument("--samples", type=number, default=1000, metavar="N", help="of each kind")
    parser.add_argument("--rounds", type=number, default=5, metavar="N", help="of both")
    args = parser.parse_args(arguments)
    rows = [["shards", "KB a sample", "reading, samples/s", "show, samples/s", "show / reading"]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = str(build_toy_tokenizer(folder / "tokenizer", [TEXT]))
        for name, kind, grain in KINDS:
            shards = write_shards(repeated(kind, grain, args.samples), folder / name)
            size = sum(shard.stat().st_size for shard in shards) / args.samples / 1e3
            reading, counting, ratio = compare(folder / name, tokenizer, args.rounds)
            rows.append([name, f"{size:.0f}", f"{reading:.0f}", f"{counting:.0f}", f"{ratio:.2f}"])
    print(format_table(rows))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
