"""Transcripts beside their videos: `.srt`, `.vtt`, whisper's `.json`, to records of `speech.py`."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from data_pipeline import files
from data_pipeline.importers.speech import words_field
from data_pipeline.importers.timeline import DENSE
from data_pipeline.schema import SampleError
from data_pipeline.seconds import parse_seconds
from data_pipeline.strict_json import loads

SUFFIXES = (".srt", ".vtt", ".json")
_BEST_FIRST = (".json", ".vtt", ".srt")  # the first ones may have the times of words
# Whether a line is one of times is seen by the arrow: what is wrong with them is told later.
_CLOCK = r"(-?\d+(?:\s?[:.,;]\s?\d+)*)"
_TIMING = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}")
_COLON = re.compile(r"(\d+:\d+:\d+):(\d{3})")  # before milliseconds
_COMMENTS = ("WEBVTT", "NOTE", "STYLE", "REGION")  # how blocks of .vtt begin that are not shown
_HEADER = 10  # lines at the start of a .vtt among which is what is said of all of it
_AT_ONCE = 0.1  # seconds; captions that roll keep a line for less, before the next one comes
_UNSPACED = re.compile(rf"[{DENSE}]{{2}}")
_SAID_ONCE = "line shown in two cues, said once"
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


def once(found: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Transcripts and their videos without those that say the same again: whisper writes each as
    .json, .vtt and .srt; and without .json beside a video's transcript that has no words."""
    of_video = Counter(video for _, video in found)
    kept: dict[tuple[str | None, str], tuple[str, str | None]] = {}
    for path, video in sorted(found, key=lambda one: _BEST_FIRST.index(files.suffix(one[0]))):
        again = video is not None and of_video[video] > 1
        if not again or files.suffix(path) != ".json" or _has_words(path, video):
            own = path.rpartition(".")[0] if again else path
            kept.setdefault((video, own), (path, video))
    left = frozenset(kept.values())
    return [one for one in found if one in left]


def _has_words(path: str, video: str | None) -> bool:
    try:
        read_transcript(path, video)
    except SampleError:
        return False
    return True


def read_transcript(path: str, video: str | None) -> tuple[dict[str, Any], list[str]]:
    """A transcript as a record with words and its clip, and what is worth a note; SampleError."""
    if video is None:
        raise SampleError("missing_file", f"{path}: no video of its name beside it")
    text = files.decode_text(files.read_bytes(path), files.name(path))
    if files.suffix(path) != ".json":
        notes: list[str] = []
        lines = text.replace("\r\n", "\n").splitlines()  # \r\r\n: written as text twice on Windows
        shifted = any(line.startswith("X-TIMESTAMP-MAP") for line in lines[:_HEADER])
        notes += ["X-TIMESTAMP-MAP of a transcript, not used"] * shifted
        cues = _once(_cues(lines, notes), notes)
        words = [word for cue in cues for word in _timed(cue)]
        if not words:
            raise SampleError("missing_text", f"{files.name(path)}: no cue with a time")
        return {"video": video, "words": words}, notes
    try:
        record = loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_json", f"{files.name(path)}: {error}") from None
    if isinstance(record, list):
        record = {"segments": record}
    if not isinstance(record, dict) or words_field(record) is None:
        raise SampleError("missing_text", f"{files.name(path)}: no segments with start and end")
    return {name: record[name] for name in record if name != "text"} | {"video": video}, []


@dataclass(frozen=True)
class _Cue:
    """A cue: its times as they are written, and its lines."""

    start: str
    end: str
    lines: list[str] = field(default_factory=list)


def _cues(lines: list[str], notes: list[str]) -> Iterator[_Cue]:
    """The cues of a file. A line of times begins one; before it stands its number or name.

    Text behind an empty line goes on with the cue in .srt, and is not shown in .vtt.
    """
    web = bool(lines) and lines[0].startswith("WEBVTT")
    cue: _Cue | None = None
    loose: list[str] = []  # since the last empty line
    behind = True  # an empty line, or before the first cue
    for line in [*lines, ""]:
        timing = _TIMING.match(line)
        if timing is None and (line if web else line.strip()):
            (loose if behind or cue is None else cue.lines).append(line.strip())
            continue
        if timing is not None:
            named = loose if behind or cue is None else cue.lines
            if named and (named[-1].isdigit() or (web and behind)):
                named.pop()
        if cue is not None and not web:
            cue.lines.extend(loose)
        elif loose and not loose[0].startswith(_COMMENTS):
            notes += ["line of a transcript without a time, left out"] * len(loose)
        loose, behind = [], timing is None
        if timing is not None:
            if cue is not None:
                yield cue
            cue = _Cue(_written(timing[1]), _written(timing[2]))
    if cue is not None:
        yield cue


def _written(time: str) -> str:
    """A time without blanks, with a point before its milliseconds."""
    plain = "".join(time.split()).replace(",", ".")
    colon = _COLON.fullmatch(plain)
    return f"{colon[1]}.{colon[2]}" if colon else plain


def _once(cues: Iterator[_Cue], notes: list[str]) -> Iterator[_Cue]:
    """Yields the cues without the lines that rolling captions show again at the top of the next
    cue.

    The same words in a later cue of their own are said again. A line of two
    cues alone may be meant twice, too (`- No.`), and is noted: captions that roll go on and on.
    """
    before: list[str] = []
    until = 0.0
    rolls = open_ = False  # whether the cue before shows lines again; and is the first that does
    for cue in cues:
        lines = [line for line in cue.lines if _plain(line)]
        plain = [_plain(line) for line in lines]
        if not plain:
            continue
        most = min(len(before), len(plain))
        again = next((n for n in range(most, 0, -1) if before[-n:] == plain[:n]), 0)
        start, end = _second(cue.start, until), _second(cue.end, until)
        late = start > until + _AT_ONCE
        if late and again == len(plain):
            again = 0
        repeated = again > 0 and (late or (again == len(plain) and end > start + _AT_ONCE))
        ended = open_ and (late or not again)
        notes += [_SAID_ONCE] * (repeated + ended)
        open_ = 0 < again < len(plain) and not repeated and not rolls
        rolls, before, until = again > 0, plain, end
        yield _Cue(cue.start, cue.end, lines[again:])
    notes += [_SAID_ONCE] * open_


def _second(time: str, default: float) -> float:
    try:
        return parse_seconds(time)
    except ValueError:  # told when its words are read
        return default


def _plain(text: str) -> str:
    return html.unescape(_TAG.sub("", text)).strip()


def _joined(lines: list[str]) -> str:
    """Lines as one text, with a space between them, but not in scripts without spaces."""
    text = lines[0] if lines else ""
    for before, line in pairwise(lines):
        dense = _UNSPACED.fullmatch(_plain(before)[-1:] + _plain(line)[:1])
        text += line if dense else f" {line}"
    return text


def _timed(cue: _Cue) -> Iterator[list[Any]]:
    """`[start, end, text]` of a cue, or of each word that has a time of its own."""
    pieces = _INLINE.split(_joined(cue.lines))
    times = [cue.start, *map(_written, pieces[1::2]), cue.end]
    for text, first, last in zip(pieces[::2], times, times[1:], strict=False):
        if plain := _plain(text):
            yield [first, last, plain]
