"""Transcripts beside their videos: `.srt`, `.vtt`, whisper's `.json`, to records of `speech.py`."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import Any

from data_pipeline import files
from data_pipeline.importers.speech import words_field
from data_pipeline.schema import SampleError

SUFFIXES = (".srt", ".vtt", ".json")
# Whether a line is one of times is seen by the arrow: what is wrong with them is told later.
_TIMING = re.compile(r"\s*(-?\d[\d:.,]*)\s*-->\s*(-?\d[\d:.,]*)")
_INLINE = re.compile(r"<((?:\d+:)?\d+:\d+(?:[.,]\d+)?)>")
_TAG = re.compile(r"</?[^<>]*>|\{\\[^}]*\}")  # <i>, <c.colour>, {\an8}


def stems(path: str) -> list[str]:
    """The names that a transcript's video may have: `talk.en.srt` is `talk.en`'s or `talk`'s."""
    whole = files.composed(files.name(path))
    parts = whole.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def pairs(paths: list[str]) -> list[tuple[str, str | None]]:
    """Each transcript among files, and the video of its name (None: there is none)."""
    videos: dict[str, str] = {}
    for path in paths:
        if files.suffix(path) in files.VIDEO_SUFFIXES:
            videos.setdefault(files.composed(path.rpartition(".")[0]), path)
    found = []
    for path in paths:
        if files.suffix(path) not in SUFFIXES:
            continue
        folder = path[: len(path) - len(files.name(path))]
        names = [files.composed(folder) + stem for stem in stems(path)]
        video = next((videos[name] for name in names if name in videos), None)
        if video is not None or files.suffix(path) != ".json":
            found.append((path, video))
    return found


def read_transcript(path: str, video: str | None) -> dict[str, Any]:
    """A transcript as a record with words and its clip; SampleError."""
    if video is None:
        raise SampleError("missing_file", f"{path}: no video of its name beside it")
    text = files.decode_text(files.read_bytes(path), files.name(path))
    if files.suffix(path) != ".json":
        cues = list(_cues(text))
        if not cues:
            raise SampleError("missing_text", f"{files.name(path)}: no cue with a time")
        return {"video": video, "words": cues}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"{files.name(path)}: {error}") from None
    if not isinstance(record, dict) or words_field(record) is None:
        raise SampleError("missing_text", f"{files.name(path)}: no segments with start and end")
    return {name: record[name] for name in record if name != "text"} | {"video": video}


def _cues(text: str) -> Iterator[list[Any]]:
    """`[start, end, text]` of each cue, or of each word that has a time of its own."""
    cue: tuple[str, str] | None = None
    lines: list[str] = []
    before = ""
    for line in [*text.splitlines(), ""]:
        timing = _TIMING.match(line)
        if timing is None and line.strip():
            lines.append(line.strip())
            continue
        if cue is not None:
            if timing is not None and lines and lines[-1].isdigit():
                lines.pop()  # the number of the next cue, without a blank line before it
            for shown in lines:
                plain = _plain(shown)
                if plain and plain != before:  # rolling captions show a line twice
                    yield from _timed(shown, *cue)
                before = plain or before
        cue = (timing[1], timing[2]) if timing is not None else None
        lines = []


def _plain(text: str) -> str:
    return html.unescape(_TAG.sub("", text)).strip()


def _timed(line: str, start: str, end: str) -> Iterator[list[Any]]:
    pieces = _INLINE.split(line)
    times = [start, *pieces[1::2], end]
    for text, first, last in zip(pieces[::2], times, times[1:], strict=False):
        if plain := _plain(text):
            yield [first.replace(",", "."), last.replace(",", "."), plain]
