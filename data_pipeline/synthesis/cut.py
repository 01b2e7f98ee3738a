"""Cuts videos into clips, and makes the picture of each second that the models see."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image
from torch import Tensor

from data_pipeline import files
from data_pipeline.importers.speech import Word, timed_words
from data_pipeline.importers.transcripts import SUFFIXES, pairs, read_transcript
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from data_pipeline.synthesis.config import CutConfig
from data_pipeline.video import Video, open_video

_QUALITY = 85  # JPEG quality of the pictures that a model sees
_SMALL = 32  # side, in pixels, of the pictures that are compared to find a cut
_QUIET = 0.15  # added to the change (0..1) of a second without speech, so that cuts prefer these


@dataclass(frozen=True)
class Source:
    """A video file, and the files beside it."""

    path: str
    name: str  # the path below the folder that was given, without suffix; keys begin with it
    transcript: str | None = None  # path of its words with times
    about: str | None = None  # path of a text with what is known of the video

    def identity(self) -> list[list[object]]:
        """Path, size and time of each file: a value that changes when a file does."""
        named = [path for path in (self.path, self.transcript, self.about) if path]
        if any(map(files.is_url, named)):
            return [[path, files.file_size(path)] for path in named]
        stats = [(path, os.stat(path)) for path in named]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]


@dataclass(frozen=True)
class Clip:
    """Seconds of a video: `pictures` are `data:` URLs, one for each second from `start` on."""

    start: int
    pictures: tuple[str, ...]
    words: tuple[Word, ...] = ()  # of the whole video, in its seconds
    about: str = ""

    @property
    def end(self) -> int:
        """The last second that is shown."""
        return self.start + len(self.pictures) - 1

    def part(self, first: int, count: int) -> Clip:
        """The clip of `count` seconds from second `first` of this clip on."""
        pictures = self.pictures[first : first + count]
        return Clip(self.start + first, pictures, self.words, self.about)

    def speech(self, first: int, last: int) -> str:
        """The words said in seconds `first` to `last` of the clip, both included."""
        begin, end = self.start + first, self.start + last + 1
        return "".join(word.text for word in self.words if begin <= word.start < end).strip()


def find_sources(source: str) -> list[Source]:
    """The videos of a file or folder, in order of name, with the transcripts (`talk.en.srt`) and
    texts (`talk.txt`) beside them. ShardError: there is no video."""
    listed = files.list_files(source) if files.is_folder(source) else [source]
    root = source.rstrip("/") if files.is_folder(source) else files.parent(source)
    videos = [path for path in listed if files.suffix(path) in files.VIDEO_SUFFIXES]
    if not videos:
        raise ShardError(f"{source}: no videos: {' '.join(sorted(files.VIDEO_SUFFIXES))}")
    beside = listed if files.is_folder(source) else _beside(source)
    spoken = {video: path for path, video in pairs([p for p in beside if _is_transcript(p)]
                                                   + videos) if video}  # fmt: skip
    texts = {path.rpartition(".")[0]: path for path in beside if files.suffix(path) == ".txt"}
    return [
        Source(path, _name(path, root), spoken.get(path), texts.get(path.rpartition(".")[0]))
        for path in videos
    ]


def _is_transcript(path: str) -> bool:
    return files.suffix(path) in SUFFIXES


def _beside(path: str) -> list[str]:
    if files.is_url(path):
        return [path]
    folder = os.path.dirname(path) or "."
    return sorted(files.join(folder, name) for name in os.listdir(folder))


def _name(path: str, root: str) -> str:
    """A path below `root` without its suffix."""
    inside = path.removeprefix(root).lstrip("/")
    return inside.rpartition(".")[0] or inside


def key_of(name: str) -> str:
    """The first part of samples' keys: the name without dots, distinct for distinct names."""
    plain = re.sub(r"[^\w-]", "_", name)
    if plain == name:
        return plain
    return f"{plain}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:8]}"


def clips(source: Source, data: bytes, config: CutConfig, notes: list[str]) -> list[Clip]:
    """The clips of a video's bytes. SampleError: it cannot be read, or is too short.

    What of the transcript is left out or changed is added to `notes`.
    """
    words = tuple(_words(source, notes))
    about = ""
    if source.about:
        about = files.decode_text(files.read_bytes(source.about), source.about).strip()
    with open_video(data) as video:
        seconds = _seconds(video)
        if len(seconds) < config.shortest:
            raise SampleError("too_short", f"{len(seconds)} s, less than cut.shortest "
                              f"({config.shortest} s)")  # fmt: skip
        pictures, small = [], []
        for frame in video.frames([float(second) for second in seconds]):
            picture = Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()))
            pictures.append(_data_url(picture, config.frame_side))
            small.append(_small(frame))
    marks = _cut(small, words, seconds[0], config)
    return [
        Clip(seconds[first], tuple(pictures[first:last]), words, about)
        for first, last in pairwise(marks)
    ]


def _seconds(video: Video) -> range:
    """The whole seconds of the file's clock at which something is on screen."""
    info = video.info
    return range(math.ceil(info.first - 1e-3), math.floor(info.duration - 1e-3) + 1)


def _words(source: Source, notes: list[str]) -> list[Word]:
    if source.transcript is None:
        return []
    record, read = read_transcript(source.transcript, source.path)
    notes += read
    return timed_words(record, notes)


def _data_url(picture: Image.Image, side: int) -> str:
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _small(frame: Tensor) -> np.ndarray:
    """The frame in grey and small: float [_SMALL, _SMALL], 0..1."""
    grey = Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy())).convert("L")
    return np.asarray(grey.resize((_SMALL, _SMALL), Image.Resampling.BOX), np.float32) / 255


def _cut(
    small: Sequence[np.ndarray], words: Sequence[Word], first: int, config: CutConfig
) -> list[int]:
    """The second at which each clip begins, and the end of the last one.

    A clip is at least `shortest` and at most `clip` seconds long. It ends where the picture
    changes most, and rather where nobody speaks.
    """
    count = len(small)
    spoken = {second for word in words for second in range(int(word.start), int(word.end) + 1)}
    change = [0.0] + [
        float(np.abs(a - b).mean()) + (_QUIET if first + i not in spoken else 0.0)
        for i, (a, b) in enumerate(zip(small[1:], small, strict=False), 1)
    ]
    marks = [0]
    while count - marks[-1] > config.clip:
        low, high = marks[-1] + config.shortest, marks[-1] + config.clip
        high = min(high, count - config.shortest)  # what is left is a clip, too
        places = range(min(low, high), high + 1)
        marks.append(max(places, key=lambda place: (change[place], place)))
    return [*marks, count]
