"""`show`: counts samples, frames and tokens of each source, their lengths, and how well they pack.

No medium is decoded and no picture is read: of a tar the JSON members are read, of its videos the
header, from where they lie. So the frames of a video of a `chat` are those of the length that its
header states.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import av

from data_pipeline.batch import IGNORED_LABEL, EncodedSample
from data_pipeline.encode import EncodeConfig
from data_pipeline.importers.archive import DAMAGE
from data_pipeline.progress import Progress
from data_pipeline.prompts import PromptBuilder, PromptForm
from data_pipeline.schema import Sample, SampleError, member_named, parse_sample
from data_pipeline.shards import shard_files
from data_pipeline.tables import format_table
from data_pipeline.tokens import SpecialTokens, load_tokenizer
from data_pipeline.video import VideoInfo, sample_times
from moss_train.parallel.packing import Bounds, pack
from tools.data.header import stated_seconds
from tools.data.places import file_places
from tools.shards.workers import each_shard

_STEP = 256  # samples that are packed together
_BARS = 24


@dataclass
class Mixture:
    """Counts of a shard or a source; `lengths`: tokens and frames of each sample."""

    samples: int = 0
    frames: int = 0
    text: int = 0  # tokens that are not frames
    labels: int = 0
    realtime_labels: int = 0
    silence: int = 0  # of the latter
    lengths: list[tuple[int, int]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: Mixture) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def row(self, length: int) -> list[str]:
        ratio = f"{self.silence / self.realtime_labels:.3f}" if self.realtime_labels else "-"
        tokens = sorted(count for count, _ in self.lengths) or [0]
        errors = ", ".join(f"{reason} {count}" for reason, count in self.errors.items())
        numbers = (self.samples, self.frames, self.text, self.frames, self.labels)
        return [
            *map(str, numbers), ratio, str(tokens[len(tokens) // 2]), str(tokens[-1]),
            f"{packing(self.lengths, length):.3f}" if self.lengths else "-", errors or "-",
        ]  # fmt: skip


HEAD = ["source", "samples", "frames", "text tokens", "image tokens", "labels", "silence ratio",
        "median length", "longest", "packing", "errors"]  # fmt: skip


def mixture(sources: list[Path], config: EncodeConfig, workers: int) -> dict[Path, Mixture]:
    """The counts of each source."""
    shards = [(source, shard) for source in sources for shard in shard_files(source)]
    by_source = {source: Mixture() for source in sources}
    progress = Progress("show", len(shards), unit="shards")
    count = partial(shard_mixture, config=config)
    each = each_shard(count, [shard for _, shard in shards], workers)
    for (source, _), counted in zip(shards, each, strict=True):
        by_source[source].add(counted)
        progress.step()
    progress.end()
    return by_source


def table(by_source: dict[Path, Mixture], length: int) -> str:
    """A row for each source, and one for all of them."""
    rows = [[str(source), *counts.row(length)] for source, counts in by_source.items()]
    if len(by_source) > 1:
        together = Mixture()
        for counts in by_source.values():
            together.add(counts)
        rows.append(["all", *together.row(length)])
    return format_table([HEAD, *rows], "lr")


def packing(lengths: Sequence[tuple[int, int]], length: int) -> float:
    """The share of microbatches of `length` tokens that is filled, when packed as in training."""
    used = space = 0
    for first in range(0, len(lengths), _STEP):
        step = [_Sized(range(min(tokens, length)), range(frames))
                for tokens, frames in lengths[first : first + _STEP]]  # fmt: skip
        packed = pack(cast(list[EncodedSample], step), Bounds(tokens=length))
        used += sum(len(sample.tokens) for sample in step)
        space += length * len(packed)
    return used / space if space else 0.0


@dataclass(frozen=True)
class _Sized:
    """A sample of which only the lengths are known."""

    tokens: range
    frames: range


def histogram(lengths: Sequence[tuple[int, int]]) -> str:
    """Tokens of samples as an SVG of bars."""
    tokens = [count for count, _ in lengths] or [0]
    width = max(1, -(-(max(tokens) + 1) // _BARS))
    bars = Counter(count // width for count in tokens)
    most = max(bars.values())
    drawn = "".join(
        f'<rect x="{bar * 14}" y="{100 - 96 * count / most:.1f}" width="12" '
        f'height="{96 * count / most:.1f}" fill="#4878a8">'
        f"<title>{bar * width} to {(bar + 1) * width - 1} tokens: {count}</title></rect>"
        for bar, count in sorted(bars.items())
    )
    return (
        f'<svg viewBox="0 0 {14 * _BARS} 114" xmlns="http://www.w3.org/2000/svg">{drawn}'
        f'<text x="0" y="112" font-size="10">0</text><text x="{14 * _BARS}" y="112" '
        f'font-size="10" text-anchor="end">{width * _BARS} tokens</text></svg>'
    )


def shard_mixture(shard: Path, config: EncodeConfig) -> Mixture:
    """Counts the samples of a shard; those that cannot be counted are errors, by reason."""
    counted = Mixture()
    tokenizer = load_tokenizer(config.tokenizer)
    special = SpecialTokens.from_tokenizer(tokenizer, config.tokenizer)
    prompts = PromptBuilder(tokenizer, special)
    with shard.open("rb") as file:
        for key, members in _keys(file, counted):
            try:
                described = member_named("json", members)
                if described is None:
                    raise SampleError("missing_json", key)
                sample = parse_sample(key, _Slice(file, *members[described]).read())
                _count(sample, members, file, prompts, special, config, counted)
            except SampleError as error:
                counted.errors[error.reason] += 1
            except (av.FFmpegError, ValueError, IndexError):
                counted.errors["undecodable_video"] += 1
    return counted


def _keys(file: BinaryIO, counted: Mixture) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yields, sample by sample, where its members lie; those of a sample follow each other."""
    key, members = "", dict[str, tuple[int, int]]()
    try:
        places = file_places(file)
    except DAMAGE:
        counted.errors["damaged_shard"] += 1
        return
    for name, offset, size in places:
        stem, _, rest = name.partition(".")
        if stem != key and members:
            yield key, members
            members = {}
        key, members[rest] = stem, (offset, size)
    if members:
        yield key, members


def _count(
    sample: Sample,
    members: dict[str, tuple[int, int]],
    file: BinaryIO,
    prompts: PromptBuilder,
    special: SpecialTokens,
    config: EncodeConfig,
    counted: Mixture,
) -> None:
    realtime = sample.kind == "realtime"
    form: PromptForm = "realtime" if realtime else (
        "pretrain" if config.prompt == "pretrain" else "chat"
    )  # fmt: skip
    frames = []
    for owner in sample.mark_media():
        medium = sample.media[owner]
        name = member_named(medium.file, members)
        if name is None:
            raise SampleError("missing_media", medium.file)
        plain = realtime or medium.type == "image"
        frames.append(1 if plain else _frames(_Slice(file, *members[name]), config))
    prompt = prompts.build(
        sample.messages, frames, form=form, sequence_length=config.sequence_length
    )
    labels = len(prompt.labels) - prompt.labels.count(IGNORED_LABEL)
    frame_count = len(prompt.frame_positions)
    counted.samples += 1
    counted.frames += frame_count
    counted.text += len(prompt.tokens) - frame_count
    counted.labels += labels
    counted.realtime_labels += labels if realtime else 0
    counted.silence += prompt.labels.count(special.silence) if realtime else 0
    counted.lengths.append((len(prompt.tokens), frame_count))


def _frames(file: _Slice, config: EncodeConfig) -> int:
    """The number of frames that are sampled of a video, by the length that its header states."""
    seconds = stated_seconds(cast(BinaryIO, file), file.size)
    info = VideoInfo(seconds, seconds, 0)
    times = sample_times(info, config.video_fps, config.video_min_frames, config.video_max_frames)
    return len(times)


class _Slice(io.RawIOBase):
    """A member of a tar as a file that reads only what is asked for."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self.size, self._at = file, offset, size, 0

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self._at)
        size = left if count < 0 else min(count, left)
        data = os.pread(self._file.fileno(), size, self._offset + self._at)
        self._at += len(data)
        return data

    def seek(self, to: int, whence: int = 0) -> int:
        self._at = max(0, to + (0, self._at, self.size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
