"""Times as people write them, and as a player shows them: `3`, `3.5s`, `00:03`, `1:02:03.5`.

Of a clock the decimals may stand behind a comma, as in .srt files.
"""

from __future__ import annotations

import math
import re
from typing import Any

_PLAIN = re.compile(r"(\d+\.?\d*|\.\d+)\s*s?")
_CLOCK = re.compile(r"(?:(\d+):(?=\d+:))?(\d+):(\d{1,2}(?:[.,]\d*)?)")
_FORMS = "3, 12.5, 3s, 00:03 (MM:SS) or 1:02:03.5 (HH:MM:SS)"


def parse_seconds(time: Any) -> float:
    """Seconds of a time: a number, or a text in one of the forms above.

    Raises ValueError for any other form, and for what is negative, infinite or not a number.
    """
    seconds = math.nan
    if isinstance(time, int | float) and not isinstance(time, bool):
        seconds = float(time)
    elif isinstance(time, str):
        seconds = _parse(time.strip().replace("\N{FULLWIDTH COLON}", ":"))
    if not 0 <= seconds < math.inf:  # nor is NaN
        raise ValueError(f"{time!r} is not a time from 0 on: write {_FORMS}")
    return seconds


def is_time(text: str) -> bool:
    """Whether `parse_seconds` takes it."""
    try:
        parse_seconds(text)
    except ValueError:
        return False
    return True


def _parse(text: str) -> float:
    if match := _PLAIN.fullmatch(text):
        return float(match[1])
    if not (match := _CLOCK.fullmatch(text)):
        return math.nan
    hours, minutes, seconds = (
        float(match[1] or 0),
        float(match[2]),
        float(match[3].replace(",", ".")),
    )
    # 75:00 is an hour and a quarter; 1:75:00 and 0:75 are slips.
    if seconds >= 60 or (match[1] and minutes >= 60):
        return math.nan
    return hours * 3600 + minutes * 60 + seconds


def clock(seconds: float) -> str:
    """75.2 -> 01:15, 3675 -> 1:01:15"""
    minutes, second = divmod(int(seconds + 1e-6), 60)
    if minutes < 60:
        return f"{minutes:02d}:{second:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
