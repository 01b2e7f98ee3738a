"""Pictures and videos with captions: folders of files, and tables of paths and captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_pipeline import files
from data_pipeline.importers.draft import (
    NOTHING,
    VIDEO_IDS,
    Draft,
    Entry,
    Medium,
    caption_draft,
    distinct_stems,
    may_name_medium,
    media_type,
    medium,
    names_medium,
    text_draft,
    unused_fields,
)
from data_pipeline.importers.spans import opened, span_of, spans_of
from data_pipeline.schema import MediaType, SampleError
from data_pipeline.shards import ShardError

# Names of columns in common tables, the likeliest first.
MEDIA_COLUMNS = (
    "file_name", "video_path", "image_path", "video", "image", "path", "file", "filename",
    "filepath", "video_url", "image_url", "url",
)  # fmt: skip
_LISTS = (
    "images", "videos", "file_names", "image_paths", "video_paths", "image_urls", "video_urls",
)  # fmt: skip
# Columns that plain text has, too: they say where it is from (C4, FineWeb, collections of code).
_ORIGINS = frozenset({"path", "file", "filename", "filepath", "url"})
# Ids, which are the names of videos, where a table names none otherwise (Panda-70M, InternVid).
_IDS = (*VIDEO_IDS, "videoid", "youtube_id", "youtubeid", "vid", "clip_id")
CAPTION_COLUMNS = (
    "caption", "text", "description", "sentence", "captions", "sentences", "narration",
)  # fmt: skip


def folder_entries(folder: str, paths: list[str]) -> Iterator[Entry]:
    """A sample for each picture or video below a folder, captioned by the .txt of its name."""
    (stem,) = distinct_stems([files.name(folder.rstrip("/"))])
    captions = {_stem(path): path for path in paths if files.suffix(path) == ".txt"}
    media = [path for path in paths if media_type(path)]
    for number, path in enumerate(media):
        kind = media_type(path)
        assert kind is not None
        caption = captions.pop(_stem(path), None)
        draft: Draft | SampleError
        if caption is None:
            draft = SampleError("missing_caption", f"{files.name(path)}: no .txt of this name")
        else:
            draft = caption_draft(Medium(kind, path, files.suffix(path)), caption_file=caption)
        share = (number + 1) / len(media)
        yield Entry(f"{stem}-{number:06d}", _inside(folder, path), share, draft)
    for number, path in enumerate(captions.values(), len(media)):
        reason = SampleError("missing_file", "no picture or video has this text's name")
        yield Entry(f"{stem}-{number:06d}", _inside(folder, path), 1.0, reason)


def is_captioned(paths: list[str]) -> bool:
    """Whether at least one picture or video has a text of its name."""
    texts = {_stem(path) for path in paths if files.suffix(path) == ".txt"}
    return any(media_type(path) and _stem(path) in texts for path in paths)


def _stem(path: str) -> str:
    return files.composed(path.rpartition(".")[0])


def _inside(folder: str, path: str) -> str:
    return path.removeprefix(folder.rstrip("/")).lstrip("/")


def looks_like_a_table(record: dict[str, Any]) -> bool:
    if "text" in record:
        there = [column for column in MEDIA_COLUMNS if column in record]
        return any(not _is_origin(column, record[column]) for column in there) or bool(
            _naming(record)
        )
    named = any(may_name_medium(record[column]) for column in _spelt(_LISTS, record))
    captioned = bool(_spelt(CAPTION_COLUMNS, record))
    return named or bool(_spelt(MEDIA_COLUMNS, record)) or (captioned and bool(_ids(record)))


def has_captions(record: dict[str, Any]) -> bool:
    """Whether a record names a medium, and has a column of captions."""
    return any(column in record for column in CAPTION_COLUMNS) and looks_like_a_table(record)


def _ids(record: Mapping[str, Any]) -> list[str]:
    """The columns of a table that have the id of a video."""
    return [column for column in _spelt(_IDS, record) if isinstance(record[column], str)]


def _naming(record: dict[str, Any]) -> list[str]:
    """The columns that name the media of a record that has a `text`. One in another letter case
    does by a suffix alone: `Path`, `File` or `URL` of plain text says where that is from."""
    usual = (*MEDIA_COLUMNS, *_LISTS)
    exact = [
        column
        for column in usual
        if may_name_medium(record.get(column)) and not _is_origin(column, record[column])
    ]
    return exact or [
        column
        for column in _spelt(usual, record)
        if column not in usual and isinstance(record[column], str) and media_type(record[column])
    ]


def may_have_origin(record: dict[str, Any]) -> bool:
    """Whether a record has a text, and a column that says where it is from, or names a medium."""
    return "text" in record and any(column in record for column in _ORIGINS)


def _is_origin(column: str, value: Any) -> bool:
    """Whether a column says where a text is from: the URL of a page, a file of another kind."""
    if column not in _ORIGINS or not isinstance(value, str) or media_type(value) is not None:
        return False
    return files.is_url(value) or bool(files.suffix(value))


def _spelt(usual: Iterable[str], record: Mapping[str, Any]) -> list[str]:
    """The columns of these names, as the record spells them: LAION's are `URL` and `TEXT`."""
    there = [name for name in usual if name in record]
    if there:
        return there
    own = {str(name).lower(): name for name in record}
    return [own[name] for name in usual if name in own]


def table_draft(
    record: dict[str, Any], base: str, media_column: str | None, caption_column: str | None
) -> list[Draft]:
    """A record with the path of a picture or video and its caption, or a list of them, each of
    which is a draft; SampleError, ShardError."""
    try:
        place = _column(record, media_column, _media_columns(record), "--media-column")
    except ShardError as error:
        raise SampleError("missing_file", str(error)) from None
    try:
        words = _column(record, caption_column, CAPTION_COLUMNS, "--caption-column")
    except ShardError as error:
        raise SampleError("missing_caption", str(error)) from None
    if not names_medium(record[place]):
        raise SampleError("missing_file", f"{place} is empty")
    value = _only(record[place], place)
    try:
        own_medium = medium(_type(place, value, base), value, base)
    except ValueError as error:  # a URL that cannot be one
        raise SampleError("bad_schema", f"{place}: {value!r:.80}: {error}") from None
    return _captioned(own_medium, record, (place, words))


def _captioned(own_medium: Medium, record: dict[str, Any], columns: tuple[str, ...]) -> list[Draft]:
    """A draft for each caption, of the seconds of the video that the record says it is of."""
    value = record[columns[1]]
    texts, notes = captions_of(value)
    used, parts = columns, [own_medium] * len(texts)
    if own_medium.type == "video" and _whole(value) is value:
        if several := None if notes else spans_of(record, len(texts)):
            parts = [replace(own_medium, part=seconds) for seconds in several.parts]
            used += several.fields
        elif span := span_of(record):
            parts = [replace(own_medium, part=span.parts[0])] * len(texts)
            used += span.fields
    return caption_drafts(parts, texts, notes + unused_fields(record, used))


def captions_of(value: Any) -> tuple[list[str], list[str]]:
    """The captions of a medium, and a note for each of a list that is none; SampleError where none
    is left."""
    listed = _whole(opened(value))
    captions = listed if are_captions(listed) and listed else [value]
    texts = [text for text in captions if isinstance(text, str)]
    texts = [text for text in texts if text.strip() and text.strip() not in NOTHING]
    if not texts:
        raise SampleError("missing_caption", f"{value!r:.80} is not a caption")
    return texts, ["caption without a text, left out"] * (len(captions) - len(texts))


def _whole(value: Any) -> Any:
    """Of ShareGPT4Video's captions of a video, those of keyframes, the one of all of it."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return value
    whole = [one.get("content") for one in value if str(one.get("idx")) == "-1"]
    return whole or value


def are_captions(value: Any) -> bool:
    """Whether it is a list of captions, of which some may be missing."""
    return isinstance(value, list) and all(isinstance(text, str | None) for text in value)


def caption_drafts(media: Sequence[Medium], texts: list[str], notes: list[str]) -> list[Draft]:
    """A draft for each caption, with its medium; notes: of all of them."""
    return [caption_draft(one, text.strip(), notes=() if i else tuple(notes))
            for i, (one, text) in enumerate(zip(media, texts, strict=True))]  # fmt: skip


def _only(value: Any, place: str) -> Any:
    """The one medium of a list; one of several has no place in a caption."""
    if not isinstance(value, list) or not all(isinstance(one, str | bytes | dict) for one in value):
        return value
    if len(value) > 1:
        raise SampleError("ambiguous_media", f"{place}: one caption, {len(value)} media: give "
                          "messages with a mark for each")  # fmt: skip
    return value[0]


def plain_draft(record: dict[str, Any], base: str) -> Draft | list[Draft]:
    """A record of plain text; one that names a medium, too, is a caption."""
    named = _naming(record)
    if named:
        return table_draft(record, base, named[0], None)
    return text_draft(record.get("text"), tuple(unused_fields(record, ("text",))))


def check_columns(
    path: str, record: dict[str, Any], media_column: str | None, caption_column: str | None
) -> None:
    """ShardError, which names the table, where its first record has no such columns."""
    try:
        _column(record, media_column, _media_columns(record), "--media-column")
        _column(record, caption_column, CAPTION_COLUMNS, "--caption-column")
    except ShardError as error:
        raise ShardError(f"{path}: {error}") from None


def _media_columns(record: dict[str, Any]) -> tuple[str, ...]:
    """The usual columns; also those of lists, unless they say how many media there are; and ids,
    where there is none but the URL of a page."""
    lists = (name for name in _LISTS if not isinstance(record.get(name), int | float))
    usual = MEDIA_COLUMNS + tuple(name for name in lists if name in record)
    there = [column for column in _spelt(usual, record) if _is_there(record[column])]
    pages = all(_is_origin(str(column).lower(), record[column]) for column in there)
    return (*_ids(record), *usual) if pages and "text" not in record else usual


def _column(record: dict[str, Any], named: str | None, usual: tuple[str, ...], option: str) -> str:
    there = _spelt(usual, record)
    # A table may have a column for pictures and one for videos: in each row one of them is empty.
    column = named or next(filter(lambda name: _is_there(record[name]), there), None)
    column = column or next(iter(there), None)
    if column is None or column not in record:
        raise ShardError(
            f"no column {column or ' or '.join(usual)} among {', '.join(map(str, record))}: "
            f"name it with {option}"
        )
    return column


def _is_there(value: Any) -> bool:
    return names_medium(value) and value == value  # NaN is not


def _type(column: str, value: Any, base: str) -> MediaType:
    """Picture or video: by the path's suffix, else by the column's name.

    A column that says video is believed of a picture that may be animated.
    """
    path = value.get("path") if isinstance(value, dict) else value
    column = column.lower()
    by_suffix = media_type(path) if isinstance(path, str) else None
    if path and by_suffix == "image" and column.startswith("video"):
        by_suffix = "video" if _may_move(files.join(base, path)) else "image"
    if by_suffix is None and column.startswith("image"):
        return "image"
    if by_suffix is None and (column.startswith("video") or column in _IDS):
        return "video"
    if by_suffix is None:
        raise SampleError("unknown_media", f"{value!r:.80}: not the suffix of a picture or video")
    return by_suffix


def _may_move(path: str) -> bool:
    """Whether a picture can be animated; of PNG, which mostly is not, by the file's first bytes."""
    if files.suffix(path) != ".png" or files.is_url(path):
        return files.suffix(path) in files.ANIMATED_SUFFIXES
    try:
        with open(path, "rb") as file:
            return b"acTL" in file.read(4096)
    except OSError:
        return False
