"""Imports ShareGPT JSON files with their media into shards.

    python -m data_pipeline.build SOURCE OUT

SOURCE is a JSON file with a list of records, or a folder of such files; media paths are relative
to the JSON file. OUT gets a folder of indexed shards for each of `text`, `image`, `video` and
`realtime` that occurs, and `rejected.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from data_pipeline.index import prepare_index
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError, write_shards
from data_pipeline.sharegpt import convert_record, is_realtime


@dataclass
class Summary:
    """Counts of what was imported, by group, and of what was rejected, by reason."""

    imported: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


def build_shards(source: str | Path, out_dir: str | Path, samples_per_shard: int = 1000) -> Summary:
    """Imports everything under `source`; ShardError for a source or target that cannot be used.

    A record that cannot be used is written to `rejected.jsonl` with its key and the reason.
    """
    files = _json_files(Path(source))
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    groups = _grouped(files)
    with (out / "rejected.jsonl").open("w") as rejected:
        for group, records in groups.items():
            samples = _converted(records, rejected, summary, group)
            first = next(samples, None)
            if first is not None:
                write_shards(chain([first], samples), out / group, samples_per_shard)
                prepare_index(out / group)
    return summary


def _json_files(source: Path) -> list[Path]:
    files = sorted(source.glob("*.json")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise ShardError(f"{source}: no JSON file there")
    return files


def _grouped(files: list[Path]) -> dict[str, list[tuple[str, Path, Any]]]:
    """All records, with their keys and files, by the group of shards they belong to."""
    entries = []
    for file in files:
        try:
            records = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ShardError(f"{file} cannot be read: {error}") from None
        if not isinstance(records, list):
            raise ShardError(f"{file}: expected a list of records")
        stem = re.sub(r"[^\w-]", "_", file.stem)
        entries += [(f"{stem}-{i:06d}", file, record) for i, record in enumerate(records)]
    entries.sort(key=lambda entry: _group(entry[2]))
    return {group: list(found) for group, found in groupby(entries, lambda e: _group(e[2]))}


def _group(record: Any) -> str:
    if not isinstance(record, dict):
        return "text"
    videos, images = record.get("videos"), record.get("images")
    if videos:
        return "realtime" if is_realtime(videos) else "video"
    return "image" if images else "text"


def _converted(
    records: list[tuple[str, Path, Any]], rejected: Any, summary: Summary, group: str
) -> Iterator[dict[str, Any]]:
    for key, file, record in records:
        try:
            members = convert_record(key, record, file.parent)
        except SampleError as error:
            summary.rejected[error.reason] += 1
            line = {"key": key, "file": file.name, "reason": error.reason, "detail": error.detail}
            rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
        else:
            summary.imported[group] += 1
            yield members


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data_pipeline.build", description=build_shards.__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    options = parser.parse_args(arguments)
    try:
        summary = build_shards(options.source, options.out, options.samples_per_shard)
    except ShardError as error:
        print(error, file=sys.stderr)
        return 1
    for group, count in summary.imported.items():
        print(f"{options.out / group}: {count} samples")
    for reason, count in summary.rejected.items():
        print(f"rejected, {reason}: {count} (see {options.out / 'rejected.jsonl'})")
    return 0 if summary.imported else 1


if __name__ == "__main__":
    sys.exit(main())
