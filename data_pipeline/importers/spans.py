"""Which seconds of its video a caption or a question is about: `start` and `end`, under the usual
names."""

from __future__ import annotations

import ast
import datetime
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_pipeline.importers.draft import NOTHING
from data_pipeline.importers.timeline import second_of
from data_pipeline.schema import SampleError
from data_pipeline.strict_json import loads

# Of a video, as Qwen2-VL's messages have them; either may be missing.
VIDEO_SPAN = ("video_start", "video_end")
# Names of start and end, which both must be there, in any letter case.
_PAIRS = (
    VIDEO_SPAN, ("start", "end"), ("start_time", "end_time"), ("start_sec", "end_sec"),
    ("start_timestamp", "end_timestamp"), ("clip_start", "clip_end"), ("start", "stop"),
    ("start_time", "stop_time"), ("start_timestamp", "stop_timestamp"),
)  # fmt: skip
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?(?:\D|$)")
_EPOCH = 10**8  # seconds: what is more is the time of a day, from 1973 on
_WHOLE = ((0, 0), (0, -1), (-1, -1))
_LISTS = ("timestamp", "timestamps", "segment", "segments", "span")  # which have both


Seconds = tuple[float, float]


@dataclass(frozen=True)
class Span:
    """Seconds of a video, of one part of it or of several, and the fields that say them."""

    parts: tuple[Seconds, ...]
    fields: tuple[str, ...]


def span_of(record: Mapping[str, Any]) -> Span | None:
    """What a record says of its video; None: nothing. SampleError for seconds that cannot be."""
    own = {str(name).lower(): name for name in record}
    for names in _PAIRS:
        fields = tuple(own[name] for name in names if name in own)
        if len(fields) == 2 and _is_span([record[field] for field in fields]):
            return Span((seconds_of([record[field] for field in fields], fields),), fields)
    for name, value in _lists(record):
        if _is_pair(value) and _is_span(value):
            return Span((seconds_of(value, (name, name)),), (name,))
    return None


def spans_of(record: Mapping[str, Any], count: int) -> Span | None:
    """The seconds of each of several captions; None: there is no list of so many."""
    for name, value in _lists(record):
        if isinstance(value, list) and len(value) == count and all(map(_is_pair, value)):
            return Span(tuple(seconds_of(one, (name, name)) for one in value), (name,))
    return None


def _lists(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if str(name).lower() in _LISTS:
            yield name, opened(value)


def seconds_of(times: Any, fields: tuple[str, ...]) -> Seconds:
    """Start and end, of which one may be None; SampleError."""
    start, end = (
        default if time is None else second_of(time, field)
        for time, field, default in zip(times, fields, (0.0, math.inf), strict=True)
    )
    if end <= start:
        raise SampleError(
            "bad_time", f"{fields[1]}: {end:g} s is not after {fields[0]} {start:g} s"
        )
    return start, end


def _is_span(times: Sequence[Any]) -> bool:
    """Whether start and end may be seconds of a video: not so dates, what is empty, and the 0 and
    -1 by which sets say that it is all of it."""
    start, end = map(_number, times)
    there = all(time is not None and time not in ("", *NOTHING) and time == time
                for time in (start, end))  # fmt: skip
    return there and not _is_date(start) and not _is_date(end) and (start, end) not in _WHOLE


def _number(time: Any) -> Any:
    """What a table has as text; another text as it is."""
    try:
        return float(time) if isinstance(time, str) else time
    except ValueError:
        return time.strip()


def _is_date(time: Any) -> bool:
    if isinstance(time, str):
        return _DATE.match(time) is not None
    return isinstance(time, datetime.date) or (isinstance(time, int | float) and time > _EPOCH)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(time, int | float | str) and time != "" for time in value)
    )


def opened(value: Any) -> Any:
    """A list that a table has as text, in JSON or as Python prints it; another value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    for read in (loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError):
            found = read(value.strip())
            return found if isinstance(found, list) else value
    return value
