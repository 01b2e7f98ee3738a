"""Records that keep their media under a name that a user gives (`--media-column`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from data_pipeline.importers.draft import (
    IMAGE_FIELDS,
    VIDEO_FIELDS,
    Convert,
    Draft,
    as_list,
    media_type,
    medium_name,
    names_medium,
)
from data_pipeline.schema import SampleError

TABLE = "table"  # which takes the column itself


def usual_names(record: dict[str, Any], column: str | None) -> dict[str, Any]:
    """The record with the media of a column under `images` or `videos`, as forms have them. What
    they are is said by the first one's suffix, else by the column's name."""
    value = record.get(column or "")
    if column is None or column in (*IMAGE_FIELDS, *VIDEO_FIELDS) or not names_medium(value):
        return record
    kind = media_type(medium_name(as_list(value)[0]) or "")
    is_video = kind == "video" or (kind is None and "vid" in column.lower())
    name = "videos" if is_video else "images"
    return {key: held for key, held in record.items() if key != column} | {name: value}


def with_column(converts: Mapping[str, Convert], column: str | None) -> dict[str, Convert]:
    """What makes drafts of records that have their media under that name."""
    if column is None:
        return dict(converts)
    return {
        form: convert if form == TABLE else partial(_converted, convert, column)
        for form, convert in converts.items()
    }


def _converted(
    convert: Convert, column: str, record: dict[str, Any], base: str
) -> Draft | list[Draft]:
    renamed = usual_names(record, column)
    is_video = renamed.get("videos") is record.get(column)
    fields = () if renamed is record else VIDEO_FIELDS if is_video else IMAGE_FIELDS
    if twice := next((field for field in fields if names_medium(record.get(field))), None):
        detail = f"{twice} names media beside {column}, the --media-column: keep one"
        raise SampleError("ambiguous_media", detail)
    return convert(renamed, base)
