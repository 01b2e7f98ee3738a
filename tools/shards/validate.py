"""`validate`: checks every shard below a folder: index, schema, marks, media."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.atomic import PARTIAL_SUFFIX
from data_pipeline.encode import EncodeConfig
from data_pipeline.images import decode_image
from data_pipeline.importers.archive import DAMAGE
from data_pipeline.progress import Progress
from data_pipeline.schema import Media, SampleError, member_named, parse_sample
from data_pipeline.shards import ShardError, check_source, shard_files
from data_pipeline.video import frames_at, probe_video
from tools.shards.encoding import open_encoder
from tools.shards.find import StoredSample, find_sources, indexed_counts, stored_samples
from tools.shards.workers import each_shard


@dataclass(frozen=True)
class Problem:
    """A problem: `what` is wrong, and `where` (folder, shard or sample)."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class ShardReport:
    """The keys of a shard in order, and its problems."""

    keys: list[str]
    problems: list[Problem]


def validate_tree(
    root: str | Path, config: EncodeConfig | None, workers: int
) -> tuple[int, list[Problem]]:
    """Checks all shards below `root`; returns the number of samples and all problems.

    Media are decoded, videos at a frame a second; with `config` each sample is encoded, too. Raises
    ShardError where there are no shards.
    """
    total = 0
    problems: list[Problem] = []
    for source in find_sources(root):
        counts = indexed_counts(source)
        progress = Progress(str(source), sum(counts.values()) or None)
        problems += _folder_problems(source)
        shards = shard_files(source)
        reports = each_shard(partial(check_shard, config=config), shards, workers)
        seen: dict[str, Path] = {}
        for shard, report in zip(shards, reports, strict=True):
            problems += report.problems
            problems += _key_problems(shard, report.keys, counts, seen)
            total += len(report.keys)
            progress.step(len(report.keys))
        progress.end()
    return total, problems


def _folder_problems(source: Path) -> Iterator[Problem]:
    for leftover in sorted(source.glob(f"*{PARTIAL_SUFFIX}")):
        yield Problem(str(leftover), "unfinished: its writer was killed: run the command again")
    try:
        check_source(source)
    except ShardError as error:
        yield Problem(str(source), str(error).removeprefix(f"{source}").strip(": "))


def _key_problems(
    shard: Path, keys: list[str], counts: dict[str, int], seen: dict[str, Path]
) -> Iterator[Problem]:
    count = counts.get(shard.name, len(keys))
    if count != len(keys):
        yield Problem(str(shard), f"{len(keys)} samples, the index has {count}: make it again")
    for key in keys:
        if key in seen:
            yield Problem(str(shard), f"the key {key} is also in {seen[key].name}")
        seen[key] = shard


def check_shard(shard: Path, config: EncodeConfig | None) -> ShardReport:
    """Reads a shard to its end and checks every sample."""
    encoder = open_encoder(config) if config is not None else None
    report = ShardReport([], [])
    try:
        for stored in stored_samples(shard):
            report.keys.append(stored.key)
            where = f"{shard} {stored.key}"
            try:
                wrong = list(check_sample(stored))
                if encoder is not None and not wrong:
                    encoder.encode(stored.key, stored.parts)
            except SampleError as error:
                wrong = [f"{error.reason}: {error.detail}"]
            except Exception as error:  # of any kind, from decoders
                wrong = [f"unexpected_{type(error).__name__}: {error}"]
            report.problems.extend(Problem(where, what) for what in wrong)
    except DAMAGE as error:
        damage = f"damaged_shard: after {len(report.keys)} samples: {error}"
        report.problems.append(Problem(str(shard), damage))
    return report


def check_sample(stored: StoredSample) -> Iterator[str]:
    """The problems of a sample. Raises SampleError for one that makes further checks pointless."""
    if stored.error is not None:
        raise stored.error
    if "json" not in stored.parts:
        raise SampleError("missing_json", f"members: {', '.join(sorted(stored.parts))}")
    sample = parse_sample(stored.key, stored.parts["json"])
    used = [(medium, member_named(medium.file, stored.parts)) for medium in sample.media]
    for extra in sorted(set(stored.parts) - {name for _, name in used} - {"json"}):
        yield f"unused_member: {extra} is not a medium of the sample"
    for medium, name in used:
        if name is None:
            yield f"missing_media: {medium.file} is not in the shard"
    for medium, name in used:
        if name is not None:
            yield from _media_problems(medium, stored.parts[name])


def _media_problems(medium: Media, data: bytes) -> Iterator[str]:
    try:
        if medium.type == "image":
            decode_image(data)
            return
        info = probe_video(data)
        times = medium.times or [float(second) for second in range(int(info.last) + 1)]
        for _ in frames_at(data, times):
            pass
    except SampleError as error:
        yield f"{error.reason}: {medium.file}: {error.detail}"
