"""`stats`: counts the samples of sources as they are trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.batch import IGNORED_LABEL, EncodedSample
from data_pipeline.encode import EncodeConfig
from data_pipeline.importers.archive import DAMAGE
from data_pipeline.progress import Progress
from data_pipeline.schema import MARK, Sample, SampleError, parse_sample
from data_pipeline.shards import shard_files
from tools.shards.encoding import open_encoder
from tools.shards.find import indexed_counts, stored_samples
from tools.shards.workers import each_shard

_SPECIAL = "<|silence|>", "<|...|>"


@dataclass
class Stats:
    """Counts of a shard or a source."""

    samples: int = 0  # that can be trained on
    frames: int = 0
    tokens: int = 0
    labels: int = 0
    truncated: int = 0  # samples cut at sequence_length
    realtime_labels: int = 0
    silence: int = 0  # labels of real-time samples that are <|silence|>
    words: int = 0  # of the assistant in real-time samples
    seconds: int = 0  # of video in real-time samples
    errors: Counter[str] = field(default_factory=Counter)  # samples that cannot be used

    def add(self, other: Stats) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def row(self) -> dict[str, Any]:
        """A row of the table as plain values; None for a ratio of nothing."""
        return {
            "samples": self.samples,
            "frames": self.frames,
            "tokens": self.tokens,
            "labels": self.labels,
            "silence_ratio": _ratio(self.silence, self.realtime_labels),
            "words_per_second": _ratio(self.words, self.seconds),
            "truncated_ratio": _ratio(self.truncated, self.samples),
            "errors": dict(self.errors),
        }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def source_stats(sources: list[Path], config: EncodeConfig, workers: int) -> dict[Path, Stats]:
    """The statistics of each source, its shards shared out over `workers` processes."""
    shards = [(source, shard) for source in sources for shard in shard_files(source)]
    counts = {source: indexed_counts(source) for source in sources}
    total = sum(counts[source].get(shard.name, 0) for source, shard in shards)
    progress = Progress("stats", total or None)
    by_source = {source: Stats() for source in sources}
    each = each_shard(partial(shard_stats, config=config), [shard for _, shard in shards], workers)
    for (source, _), stats in zip(shards, each, strict=True):
        by_source[source].add(stats)
        progress.step(stats.samples + stats.errors.total())
    progress.end()
    return by_source


def shard_stats(shard: Path, config: EncodeConfig) -> Stats:
    """Encodes every sample of a shard; the errors are counted by reason."""
    encoder = open_encoder(config)
    stats = Stats()
    samples = stored_samples(shard)
    while True:
        try:
            stored = next(samples)
        except StopIteration:
            return stats
        except DAMAGE:
            stats.errors["damaged_shard"] += 1
            return stats
        try:
            encoded = encoder.encode(stored.key, stored.parts)
        except SampleError as error:
            stats.errors[error.reason] += 1
        except Exception as error:  # of any kind, from decoders
            stats.errors[f"unexpected_{type(error).__name__}"] += 1
        else:
            sample = parse_sample(stored.key, stored.parts["json"])
            stats.add(sample_stats(sample, encoded, encoder.special.silence))


def sample_stats(sample: Sample, encoded: EncodedSample, silence: int) -> Stats:
    """The counts of one sample."""
    labels = encoded.labels[encoded.labels != IGNORED_LABEL]
    stats = Stats(
        samples=1,
        frames=len(encoded.frames),
        tokens=len(encoded.tokens),
        labels=len(labels),
        truncated=int(encoded.truncated),
    )
    if sample.kind == "realtime":
        stats.realtime_labels = len(labels)
        stats.silence = int((labels == silence).sum())
        stats.words = sum(_words(sample))
        # A frame of the clip is a second; pictures are not.
        kinds = [sample.media[owner].type for owner in sample.mark_media()]
        stats.seconds = kinds.count("video")
    return stats


def _words(sample: Sample) -> Iterator[int]:
    for message in sample.messages:
        if message.role == "assistant":
            text = MARK.sub("", message.content)
            for special in _SPECIAL:
                text = text.replace(special, " ")
            yield len(text.split())
