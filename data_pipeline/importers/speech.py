"""Commentary with times, to real-time drafts: what people said, word by word, and narrations.

Words are said after the first frame at or after their end, as LiveCC takes them. A text of which
only start and end are known is spread evenly over its words. A long commentary becomes several
samples, each of which shows a window of its video.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise, zip_longest
from typing import Any

from data_pipeline.importers.draft import Draft, Medium, unused_fields
from data_pipeline.importers.streaming import CLIP_FIELDS, INSTRUCTION, clip_of, names_clip
from data_pipeline.importers.timeline import (
    DENSE,
    TimedText,
    Timeline,
    order_notes,
    second_of,
    words_of,
)
from data_pipeline.schema import SampleError

WINDOW = 240  # seconds of a sample at most: LiveCC's clips have 30 to 240
_LEAD = 2  # seconds that are watched before the first word of a window
# What does not go on with the word before: several words, a sign of a script without spaces.
_WHOLE = re.compile(rf"\s|^[{DENSE}]|^$")
_PIECE_GAP = 0.2  # seconds at most between the pieces of a word
_NOISE = re.compile(r"[\[(♪][^\])]*[\])♪]?|>>+")
# What may stand in place of the words, and what is known beside it.
_LISTS = ("words", "content", "subtitles", "text_stream", "word_segments", "segments", "narrations",
          "chunks", "transcription")  # fmt: skip
_COLUMNS = ("start", "end", "text")  # lists side by side
_SPANS = frozenset({"timestamp", "offsets"})  # fields that have both times of a word
_LOOKED_AT = 10  # entries of a list, by which it is one of words
_ABOUT = ("title", "category", "previous", "language", "text", "preasr", "task_type", "source",
          "status", "duration")  # fmt: skip
_EGO4D = re.compile(r"#\s?(?:C|O|Unsure)\b|@c\b|#", re.IGNORECASE)


@dataclass(frozen=True)
class Word:
    start: float
    end: float
    text: str


def speech_draft(record: dict[str, Any], base: str, window: float = WINDOW) -> list[Draft]:
    """Words with times -> drafts; a record of LiveCC, of whisper, or with a list of triples."""
    record, question, span = _livecc(_in_rows(record))
    notes = unused_fields(record, {*CLIP_FIELDS, *_ABOUT, *_LISTS})
    words = timed_words(record, notes)
    if span is not None:
        words = _inside(words, span, notes)
    phrases = _phrases(words, notes)
    return _windows(phrases, clip_of(record, base), question, span, window, notes)


def transcript_draft(
    record: dict[str, Any], notes: list[str], window: float = WINDOW
) -> list[Draft]:
    """As `speech_draft`, for a transcript's file, with notes on how it was read."""
    first, *rest = speech_draft(record, "", window)
    return [replace(first, notes=(*notes, *first.notes)), *rest]


def timed_words(record: dict[str, Any], notes: list[str]) -> list[Word]:
    """The words of a record with their times; SampleError where it has none."""
    name = words_field(record)
    if name is None:
        raise SampleError("missing_text", f"no words with times: one of {', '.join(_LISTS)}")
    return _words(record[name], name, notes)


def narration_draft(record: dict[str, Any], base: str, window: float = WINDOW) -> list[Draft]:
    """Ego4D's narrations of a video -> drafts: each is said whole, at its time.

    Each pass of an annotator is a commentary of its own.
    """
    passes = _passes(record)
    clip, drafts = clip_of(record, base), []
    for entries in passes:
        notes: list[str] = []
        sentences = _sentences(entries, notes)
        drafts += _windows(sentences, clip, INSTRUCTION, None, window, notes) if sentences else []
    if not drafts:
        raise SampleError("missing_text", "narrations: none has a time and a sentence")
    return drafts


def _sentences(entries: list[dict[str, Any]], notes: list[str]) -> list[TimedText]:
    sentences: list[TimedText] = []
    for i, entry in enumerate(entries):
        text = entry.get("text", entry.get("narration_text"))
        time = entry.get("time", entry.get("timestamp_sec"))
        try:
            second = second_of(time, f"narrations[{i}].time")
        except SampleError:
            notes.append("narration with a bad time, left out")
            continue
        words = _EGO4D.sub("", text).strip(" .,\n").split() if isinstance(text, str) else []
        if len(words) < 2:  # somebody and what is done
            notes.append("narration without a sentence, left out")
            continue
        sentences.append(TimedText(second, " ".join([words[0].capitalize(), *words[1:]]) + "."))
    notes += order_notes(sentences, "narrations")
    ordered = sorted(sentences, key=lambda one: one.second)
    kept = [one for one, before in zip(ordered, [None, *ordered], strict=False)
            if before is None or one.text != before.text]  # fmt: skip
    notes += ["narration repeated, left out"] * (len(ordered) - len(kept))
    return kept


def _passes(record: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The narrations of each pass: under `narrations`, in Ego4D's own files under
    `narration_pass_1`, ..., in VideoLLM-online's under the ids of the passes."""
    fields = [value for name, value in record.items() if name not in (*CLIP_FIELDS, *_ABOUT)]
    lists = [record["narrations"]] if "narrations" in record else [
        value["narrations"] if isinstance(value, dict) and "narrations" in value else value
        for value in fields
    ]  # fmt: skip
    passes: dict[Any, list[dict[str, Any]]] = {}
    for number, one in enumerate(lists):
        for entry in one if isinstance(one, list) else []:
            if not isinstance(entry, dict):
                raise SampleError("bad_schema", "narrations: expected objects with time and text")
            passes.setdefault((number, entry.get("_annotation_uid")), []).append(entry)
    return list(passes.values())


def words_field(record: dict[str, Any]) -> str | None:
    """The field that has the words with their times; None: there is none."""
    record = _in_rows(record)
    return next((name for name in _LISTS if _has_words(record, name)), None)


def _in_rows(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose segments are lists side by side, as HowTo100M's are; what is missing at the
    end of one is None."""
    columns = [value for name in _COLUMNS if isinstance(value := record.get(name), list)]
    if len(columns) < len(_COLUMNS):
        return record
    rows = [dict(zip(_COLUMNS, row, strict=True)) for row in zip_longest(*columns)]
    return {k: v for k, v in record.items() if k not in _COLUMNS} | {"segments": rows}


def _has_words(record: dict[str, Any], name: str) -> bool:
    """Whether one of the first entries of a field has a time: WhisperX's numbers have none."""
    entries = record.get(name)
    if not isinstance(entries, list) or (name == "word_segments" and _in_segments(record)):
        return False
    return any(
        _has_span(entry) if isinstance(entry, dict) else isinstance(entry, list | tuple)
        and len(entry) == 3 for entry in entries[:_LOOKED_AT]
    )  # fmt: skip


def _in_segments(record: dict[str, Any]) -> bool:
    """Whether the words stand in the segments, too, whose times those without any have."""
    segments = record.get("segments")
    first = segments[0] if isinstance(segments, list) and segments else None
    return isinstance(first, dict) and bool(_own_words(first))


def are_segments(records: list[dict[str, Any]]) -> bool:
    """Whether the first records of a list are the segments of one transcript: texts with times."""
    return bool(records) and all(
        _has_span(one) and isinstance(_text(one), str) and not names_clip(one) for one in records
    )


def _has_span(entry: dict[str, Any]) -> bool:
    lasts = "duration" in entry and isinstance(_text(entry), str)  # labels may have one, too
    return not _SPANS.isdisjoint(entry) or ("start" in entry and ("end" in entry or lasts))


def looks_like_narrations(record: dict[str, Any]) -> bool:
    try:
        passes = _passes(record)
    except SampleError:
        return False
    first = passes[0][0] if passes else {}
    return {"time", "text"} <= set(first) or {"timestamp_sec", "narration_text"} <= set(first)


def _livecc(
    record: dict[str, Any],
) -> tuple[dict[str, Any], str, tuple[float, float] | None]:
    """A record's words and clip where they are parts of two messages; what the user asks; the
    seconds of the video that are shown."""
    question, span = INSTRUCTION, None
    if "text_stream" not in record and isinstance(record.get("messages"), list):
        flat: dict[str, Any] = {}
        for message in record["messages"]:
            for part in message.get("content", []) if isinstance(message, dict) else []:
                flat |= {k: v for k, v in part.items() if k != "type"}
        question = flat.pop("text", "") or question
        record = {k: v for k, v in record.items() if k != "messages"} | flat
    start, end = record.get("video_start"), record.get("video_end")
    if start is not None and end is not None:
        span = second_of(start, "video_start"), second_of(end, "video_end")
        if span[1] <= span[0]:
            raise SampleError("bad_time", f"video_end: {end!r} is not after video_start {start!r}")
    rest = {k: v for k, v in record.items() if k not in ("video_start", "video_end")}
    return rest, question, span


def has_text_stream(record: dict[str, Any]) -> bool:
    """Whether the messages are LiveCC's: a part of one of them has the words."""
    messages = record.get("messages")
    return isinstance(messages, list) and any(
        isinstance(part, dict) and "text_stream" in part
        for message in messages if isinstance(message, dict)
        for part in (message["content"] if isinstance(message.get("content"), list) else [])
    )  # fmt: skip


def _words(
    entries: list[Any], name: str, notes: list[str], before: float | None = None
) -> list[Word]:
    """The words of entries that have a text and times each, or a list of such.

    before: when the first one is said if it has no time; None: when the next one begins.
    """
    pieces = _in_pieces(entries)
    words: list[Word] = []
    if before is None:
        before = next((at for at in map(_start, entries) if at is not None), None)
    for i, entry in enumerate(entries):
        inner = _own_words(entry)
        untimed = all(_start(word) is None for word in inner)
        # WhisperX knows when a segment of numbers alone is said, and not its words.
        if inner and not (untimed and _start(entry) is not None and _text(entry)):
            words += _words(inner, f"{name}[{i}].words", notes, _start(entry))
            before = words[-1].end if words else before
            continue
        entry = _entry(entry, f"{name}[{i}]", before, notes)
        if entry is None:
            continue
        before = entry.end
        near = bool(words) and abs(entry.start - words[-1].end) <= _PIECE_GAP
        sign = not any(map(str.isalnum, entry.text))  # goes on with the word over any gap
        if pieces and words and not _WHOLE.search(entry.text) and (near or sign):
            end = entry.end if near else words[-1].end
            words[-1] = replace(words[-1], end=end, text=words[-1].text + entry.text)
        else:
            words += spread(entry.start, entry.end, entry.text)
    return words


def _own_words(segment: Any) -> list[Any]:
    """The words of a segment with times of their own; under the name may be their number, too."""
    words = segment.get("words") if isinstance(segment, dict) else None
    return words if isinstance(words, list) else []


def _start(entry: Any) -> float | None:
    """When an entry begins; None: it does not say so."""
    start = _span(entry)[0] if isinstance(entry, dict) else entry[0] if _text(entry) else None
    try:
        return second_of(start, "start")
    except SampleError:
        return None


def _in_pieces(entries: list[Any]) -> bool:
    """Whether a text without a space before it goes on with the word before, as whisper's do:
    ` 25`, `-year`, `-old`."""
    texts = [text for entry in entries if isinstance(text := _text(entry), str)]
    return 2 * sum(text.startswith(" ") for text in texts) >= len(texts)


def _text(entry: Any) -> Any:
    if isinstance(entry, dict):
        return entry.get("text", entry.get("word"))
    return entry[2] if isinstance(entry, list | tuple) and len(entry) == 3 else None


def _entry(entry: Any, field: str, before: float | None, notes: list[str]) -> Word | None:
    """An entry's text and seconds; None: it has none that can be said, which is noted.

    before: the end of the entry before it.
    """
    text = _text(entry)
    if not isinstance(text, str):
        notes.append("word without a text, left out")
        return None
    text, described = _NOISE.subn(" ", text)
    text = re.sub(r"\s{2,}", " ", text) if described else text
    notes += ["sound described in brackets, left out"] if described else []
    start, end = _span(entry) if isinstance(entry, dict) else entry[:2]
    if start is None and end is None and before is not None:
        notes.append("word without a time, said with the one before")  # numbers, of WhisperX
        start = end = before
    try:
        first, last = second_of(start, field), second_of(end, field)
    except SampleError:
        notes.append("word with a bad time, left out")
        return None
    if last < first:
        notes.append("word that ends before it starts, left out")
        return None
    return Word(first, last, text)


def _span(entry: dict[str, Any]) -> tuple[Any, Any]:
    """Start and end of an entry: in fields of their own, a pair of transformers', or whisper.cpp's
    milliseconds. The last end may be unknown."""
    pair, offsets = entry.get("timestamp"), entry.get("offsets")
    if isinstance(pair, list | tuple) and len(pair) == 2:
        return pair[0], pair[0] if pair[1] is None else pair[1]
    if isinstance(offsets, dict):
        times = (offsets.get("from"), offsets.get("to"))
        start, end = (time / 1e3 if isinstance(time, int) else None for time in times)
        return start, end
    start, end, length = (entry.get(name) for name in ("start", "end", "duration"))
    if end is None and length is not None:
        try:
            return start, second_of(start, "start") + second_of(length, "duration")
        except SampleError:
            return start, length  # one of which is told
    return start, start if end is None else end


def spread(start: float, end: float, text: str) -> Iterator[Word]:
    """The words of a text, evenly from start to end."""
    words = words_of(text)
    each = (end - start) / max(len(words), 1)
    for i, word in enumerate(words):
        yield Word(start + i * each, start + (i + 1) * each, word)


def _inside(words: list[Word], span: tuple[float, float], notes: list[str]) -> list[Word]:
    """The words of a part of a video; their times may count from its start."""
    start, end = span
    if words and words[0].start < start - 1 and words[-1].end <= end - start + 1:
        words = [replace(word, start=word.start + start, end=word.end + start) for word in words]
        notes.append("times that count from video_start")
    kept = [word for word in words if start <= word.end <= end + 1]
    notes += ["word outside video_start and video_end, left out"] * (len(words) - len(kept))
    return kept


def _phrases(words: list[Word], notes: list[str]) -> list[TimedText]:
    """What is said in each second."""
    ordered = sorted(words, key=lambda word: word.end)
    if [word.start for word in words] != sorted(word.start for word in words):
        notes.append("words not in the order of time, sorted")
    if any(b.start < a.end - 0.5 for a, b in pairwise(ordered)):
        notes.append("words whose times overlap")
    by_second = groupby(ordered, key=lambda word: math.ceil(word.end - 1e-3))
    phrases = [
        TimedText(float(second), "".join(w.text for w in group)) for second, group in by_second
    ]
    following = [*phrases[1:], None][: len(phrases)]
    return [
        replace(one, goes_on=after is not None and after.second == one.second + 1)
        for one, after in zip(phrases, following, strict=True)
    ]


def _windows(
    texts: list[TimedText],
    clip: Medium,
    question: str,
    span: tuple[float, float] | None,
    window: float,
    notes: list[str],
) -> list[Draft]:
    if not texts:
        why = f": {', '.join(dict.fromkeys(notes))}" if notes else ""
        raise SampleError("missing_text", f"no words with times are left{why}")
    drafts: list[Draft] = []
    first, last_second = 0, -1
    while first < len(texts):
        second = math.floor(texts[first].second)
        begins = math.ceil(span[0]) if span is not None and not drafts else last_second + 1
        near = span is not None and not drafts and second - begins < window
        start = min(begins if near else max(begins, second - _LEAD), second)
        inside = [one for one in texts[first:] if one.second <= start + window - 1] or [
            texts[first]
        ]
        inside[-1] = replace(inside[-1], goes_on=False)
        end = math.ceil(inside[-1].second) + 1
        timeline = Timeline((TimedText(float(start), question),), tuple(inside), start=float(start),
                            end=float(end), late=True)  # fmt: skip
        drafts.append(Draft([], [clip], "realtime", notes=tuple(notes if not drafts else ()),
                            timeline=timeline))  # fmt: skip
        first, last_second = first + len(inside), end
    return drafts
