"""Which form a source has, and its records one after the other."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline import files
from data_pipeline.importers import captions, conversation, llama_factory
from data_pipeline.importers.draft import Draft, Entry, distinct_stems, text_draft
from data_pipeline.importers.rows import first_row, read_rows
from data_pipeline.importers.webdataset import shard_entries
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError

FORMS = ("sharegpt", "alpaca", "text", "table", "llamafactory", "captions", "webdataset")
_ROW_FORMS = FORMS[:4]
_INFO = "dataset_info.json"
_METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))

Convert = Callable[[dict[str, Any], str], Draft]


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read; None: found from the source itself."""

    form: str | None = None
    media_dir: str | None = None  # what the media paths of records are relative to
    datasets: tuple[str, ...] = ()  # of a dataset_info.json; none: all
    media_column: str | None = None
    caption_column: str | None = None


@dataclass(frozen=True)
class RowFile:
    """A file of records, and how they are understood."""

    path: str
    stem: str  # of the keys
    base: str  # the folder of its media
    convert: Convert
    first: int | None = None


@dataclass(frozen=True)
class OpenSource:
    """A source whose form is known. `entries` starts at its first record at each call."""

    form: str
    files: list[str]
    entries: Callable[[], Iterator[Entry]]

    def fingerprint(self) -> str:
        """Changes with the names and sizes of the source's files."""
        known = hashlib.sha256()
        for path in self.files:
            # A folder of media has too many files to ask for the size of each.
            size = files.file_size(path) if self.form not in ("captions", "webdataset") else 0
            known.update(f"{files.name(path)} {size}\n".encode(errors="backslashreplace"))
        return f"{len(self.files)} files, {known.hexdigest()[:16]}"


def open_source(source: str, options: SourceOptions, out: Path) -> OpenSource:
    """Finds the form of a source; ShardError where there is nothing to import.

    What lies in `out` is no part of a source around it.
    """
    if options.form is not None and options.form not in FORMS:
        raise ShardError(f"--form {options.form}: choose one of {', '.join(FORMS)}")
    folder = files.is_folder(source)
    paths = files.list_files(source) if folder else [source]
    around = Path(source).resolve()
    if folder and not files.is_url(source) and out.resolve().is_relative_to(around):
        ours = os.path.join(source, out.resolve().relative_to(around), "")
        paths = [path for path in paths if not path.startswith(ours)]
    form = options.form or _form(source, folder, paths)
    if form == "captions":
        if not folder or not any(captions.media_type(path) for path in paths):
            raise ShardError(f"{source}: expected a folder of pictures or videos")
        return OpenSource(form, paths, partial(captions.folder_entries, source, paths))
    if form == "webdataset":
        tars = [path for path in paths if _is_tar(path)]
        return OpenSource(form, tars, partial(shard_entries, tars))
    if form == "llamafactory":
        return _llama_factory(source, folder, options)
    chosen = _row_files(source, folder, paths)
    *stems, other = distinct_stems([*map(_stem, chosen), "unnamed"])
    rows = [_row_file(path, stem, form, options) for path, stem in zip(chosen, stems, strict=True)]
    media = [path for path in paths if captions.media_type(path)]
    if media and files.name(chosen[0]) in _METADATA:
        entries = partial(_folder_entries, rows, media, other)
    else:
        entries = partial(_row_entries, rows)
    return OpenSource(form, [row.path for row in rows], entries)


def _form(source: str, folder: bool, paths: list[str]) -> str:
    """`rows` stands for records whose form is found file by file."""
    names = {files.name(path) for path in paths}
    if _INFO in names:
        return "llamafactory"
    if any(_is_tar(path) for path in paths):
        return "webdataset"
    if not folder or names.intersection(_METADATA):
        return "rows"
    if captions.is_captioned(paths):
        return "captions"
    if any(files.suffix(path) in files.ROW_SUFFIXES for path in paths):
        return "rows"
    if any(captions.media_type(path) for path in paths):
        return "captions"
    raise ShardError(
        f"{source}: no JSON file, table, shard, picture or video there: give records "
        f"({', '.join(sorted(files.ROW_SUFFIXES))}), a folder of media with .txt captions, "
        "or shards"
    )


def _is_tar(path: str) -> bool:
    return files.suffix(path) in files.TAR_SUFFIXES or files.name(path).endswith(".tar.gz")


def _row_files(source: str, folder: bool, paths: list[str]) -> list[str]:
    """The files of records: an image folder's metadata, else those on top, else all."""
    metadata = [path for path in paths if files.name(path) in _METADATA]
    found = [path for path in paths if files.suffix(path) in files.ROW_SUFFIXES or not folder]
    on_top = [path for path in found if files.parent(path) == source.rstrip("/")]
    chosen = metadata or on_top or found
    if not chosen:
        raise ShardError(f"{source}: no file of records there: {', '.join(files.ROW_SUFFIXES)}")
    return chosen


def _row_file(path: str, stem: str, form: str, options: SourceOptions) -> RowFile:
    base = options.media_dir or files.parent(path)
    form = form if form in _ROW_FORMS else _row_form(path, options)
    if form == "sharegpt":
        convert: Convert = conversation.conversation_draft
    elif form == "alpaca":
        convert = llama_factory.alpaca_draft
    elif form == "text":
        convert = _text
    else:
        convert = partial(
            captions.table_draft,
            media_column=options.media_column,
            caption_column=options.caption_column,
        )
    return RowFile(path, stem, base, convert)


def _stem(path: str) -> str:
    """An image folder's metadata.jsonl says nothing, its folder's name does."""
    name = files.name(path)
    return files.name(files.parent(path)) if name in _METADATA else name.rpartition(".")[0]


def _row_form(path: str, options: SourceOptions) -> str:
    row = first_row(path)
    if options.media_column or options.caption_column:
        return "table"
    if conversation.looks_like_one(row) or not row:
        return "sharegpt"
    if "instruction" in row:
        return "alpaca"
    if captions.looks_like_a_table(row):
        return "table"
    if "text" in row:
        return "text"
    raise ShardError(
        f"{path}: no form of records has the keys {', '.join(map(str, row))}: name it with --form "
        f"({', '.join(_ROW_FORMS)}), or a table's columns with --media-column and --caption-column"
    )


def _text(row: dict[str, Any], base: str) -> Draft:
    return text_draft(row.get("text"))


def _llama_factory(source: str, folder: bool, options: SourceOptions) -> OpenSource:
    info = files.join(source, _INFO) if folder else source
    base = options.media_dir or files.parent(info)
    parts: list[tuple[llama_factory.DataSet, str]] = []
    rejected: list[tuple[str, SampleError]] = []
    for found in llama_factory.read_info(info, options.datasets):
        if isinstance(found, tuple):
            rejected.append(found)
        else:
            inside = files.list_files(found.file) if files.is_folder(found.file) else [found.file]
            parts += [(found, path) for path in inside]
    stems = distinct_stems([data_set.name for data_set, _ in parts])
    rows = [
        RowFile(path, stem, base, data_set.draft, data_set.first)
        for (data_set, path), stem in zip(parts, stems, strict=True)
    ]

    def entries() -> Iterator[Entry]:
        yield from _row_entries(rows)
        for name, reason in rejected:
            yield Entry(name, _INFO, 1.0, reason)

    return OpenSource("llamafactory", [info, *(row.path for row in rows)], entries)


def _row_entries(rows: list[RowFile]) -> Iterator[Entry]:
    for at, row_file in enumerate(rows):
        for row in itertools.islice(read_rows(row_file.path), row_file.first):
            yield Entry(
                key=f"{row_file.stem}-{row.number:06d}",
                file=files.name(row_file.path),
                share=(at + row.share) / len(rows),
                draft=_draft_or_reason(row.value, row_file),
            )


def _folder_entries(rows: list[RowFile], media: list[str], stem: str) -> Iterator[Entry]:
    """The rows of an image folder's metadata, then the media that none of them names."""
    named: set[str] = set()
    for entry in _row_entries(rows):
        if isinstance(entry.draft, Draft):
            paths = [medium.content for medium in entry.draft.media]
            named.update(os.path.normpath(path) for path in paths if isinstance(path, str))
        yield entry
    left = [path for path in media if os.path.normpath(path) not in named]
    for number, path in enumerate(left):
        nothing = SampleError("missing_caption", "no row of the metadata names it")
        yield Entry(f"{stem}-{number:06d}", files.name(path), 1.0, nothing)


def _draft_or_reason(value: dict[str, Any] | SampleError, row_file: RowFile) -> Draft | SampleError:
    if isinstance(value, SampleError):
        return value
    try:
        return row_file.convert(value, row_file.base)
    except SampleError as error:
        return error
