"""Lines of a text that are moments of videos, as Charades-STA has them.

`VIDEO START END##SENTENCE`, seconds and a caption. The lines of a video may lie anywhere in the
file, and are one record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from data_pipeline import files
from data_pipeline.schema import SampleError

_MOMENT = re.compile(r"(\S+) +(\S+) +(\S+) *##(.*)")


def is_moment(line: str) -> bool:
    return _MOMENT.fullmatch(line.strip()) is not None


def records_of_moments(data: bytes, path: str) -> Iterator[dict[str, Any] | SampleError]:
    """A record for each video, in the order of their first lines, with the captions of its moments;
    a SampleError for a line that is none, or that is not text."""
    records: dict[str, dict[str, Any]] = {}
    text = data.decode(files.encoding(data), errors="replace")
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
        found = _MOMENT.fullmatch(line)
        if "\ufffd" in line:
            yield SampleError("bad_text", f"{path}: line {number}: save the file as UTF-8")
        elif found is not None:
            video, start, end, sentence = found.groups()
            empty: dict[str, Any] = {"video_uid": video, "timestamps": [], "sentences": []}
            record = records.setdefault(video, empty)
            record["timestamps"].append([start, end])
            record["sentences"].append(sentence)
        elif line:
            detail = f"line {number}: {line[:80]!r}: expected VIDEO START END##SENTENCE"
            yield SampleError("bad_schema", detail)
    yield from records.values()
