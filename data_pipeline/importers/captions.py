"""Pictures and videos with captions: folders of files, and tables of paths and captions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_pipeline import files
from data_pipeline.importers.draft import (
    Draft,
    Entry,
    caption_draft,
    distinct_stems,
    media_type,
    medium,
)
from data_pipeline.schema import MediaType, SampleError
from data_pipeline.shards import ShardError

# Names of columns in common tables, the likeliest first.
MEDIA_COLUMNS = (
    "file_name", "video_path", "image_path", "video", "image", "path", "file", "filename",
    "filepath", "video_url", "image_url", "url",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "text", "description", "sentence")


def folder_entries(folder: str, paths: list[str]) -> Iterator[Entry]:
    """A sample for each picture or video below a folder, captioned by the .txt of its name."""
    (stem,) = distinct_stems([files.name(folder.rstrip("/"))])
    captions = {path.removesuffix(".txt"): path for path in paths if path.endswith(".txt")}
    wanted = [path for path in paths if media_type(path)]
    for number, path in enumerate(wanted):
        kind = media_type(path)
        assert kind is not None
        caption = captions.pop(path.rpartition(".")[0], None)
        draft: Draft | SampleError
        if caption is None:
            draft = SampleError("missing_caption", f"{files.name(path)}: no .txt of this name")
        else:
            draft = caption_draft(medium(kind, path, folder), caption_file=caption)
        share = (number + 1) / len(wanted)
        yield Entry(f"{stem}-{number:06d}", _inside(folder, path), share, draft)
    for number, path in enumerate(captions.values(), len(wanted)):
        reason = SampleError("missing_file", "no picture or video has this text's name")
        yield Entry(f"{stem}-{number:06d}", _inside(folder, path), 1.0, reason)


def is_captioned(paths: list[str]) -> bool:
    """Whether at least one picture or video has a text of its name."""
    texts = {path.removesuffix(".txt") for path in paths if path.endswith(".txt")}
    return any(media_type(path) and path.rpartition(".")[0] in texts for path in paths)


def _inside(folder: str, path: str) -> str:
    return path.removeprefix(folder.rstrip("/")).lstrip("/")


def looks_like_a_table(record: dict[str, Any]) -> bool:
    return any(column in record for column in MEDIA_COLUMNS)


def table_draft(
    record: dict[str, Any], base: str, media_column: str | None, caption_column: str | None
) -> Draft:
    """A record with the path of a picture or video and its caption; SampleError, ShardError."""
    place = _column(record, media_column, MEDIA_COLUMNS, "--media-column")
    caption = record.get(_column(record, caption_column, CAPTION_COLUMNS, "--caption-column"))
    if not isinstance(caption, str) or not caption.strip():
        raise SampleError("missing_caption", f"{caption!r:.80} is not a caption")
    if not record[place]:
        raise SampleError("missing_file", f"{place} is empty")
    return caption_draft(medium(_type(place, record[place]), record[place], base), caption.strip())


def _column(record: dict[str, Any], wanted: str | None, usual: tuple[str, ...], option: str) -> str:
    column = wanted or next((name for name in usual if name in record), None)
    if column is None or column not in record:
        raise ShardError(
            f"no column {column or ' or '.join(usual)} among {', '.join(map(str, record))}: "
            f"name it with {option}"
        )
    return column


def _type(column: str, value: Any) -> MediaType:
    """Picture or video: by the path's suffix, else by the column's name."""
    path = value.get("path") if isinstance(value, dict) else value
    by_suffix = media_type(path) if isinstance(path, str) else None
    if by_suffix is None and column.startswith("image"):
        return "image"
    if by_suffix is None and column.startswith("video"):
        return "video"
    if by_suffix is None:
        raise SampleError("unknown_media", f"{value!r:.80}: not the suffix of a picture or video")
    return by_suffix
