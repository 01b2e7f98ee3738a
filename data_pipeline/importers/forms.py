"""Finds the form of a source, and gives its records one after the other.

A form of your own is a function in RECORD_FORMS, and, to be recognized without --form, a line in
`_record_form`: docs/extending.md adds one.
"""

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
from data_pipeline.importers.records import first_record, read_records
from data_pipeline.importers.webdataset import shard_entries
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError

_INFO = "dataset_info.json"
_METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))

Convert = Callable[[dict[str, Any], str], Draft]


def _text_draft(record: dict[str, Any], base: str) -> Draft:
    """A record of plain text; one that names a medium, too, is a caption."""
    named = [column for column in captions.MEDIA_COLUMNS if record.get(column)]
    if named:
        return captions.table_draft(record, base, named[0], None)
    return text_draft(record.get("text"), captions.text_notes(record))


# The forms of records, and what turns one (and the folder of its media) into a draft.
RECORD_FORMS: dict[str, Convert] = {
    "sharegpt": conversation.conversation_draft,
    "alpaca": llama_factory.alpaca_draft,
    "text": _text_draft,
}
FORMS = (*RECORD_FORMS, "table", "llamafactory", "captions", "webdataset")


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read; None: as its files tell."""

    form: str | None = None
    media_dir: str | None = None  # what the media paths of records are relative to
    datasets: tuple[str, ...] = ()  # of a dataset_info.json; none: all
    media_column: str | None = None
    caption_column: str | None = None


@dataclass(frozen=True)
class RecordFile:
    """A file of records, and what turns one into a draft."""

    path: str
    stem: str  # what the keys of its records start with
    base: str  # the folder of its media
    convert: Convert
    limit: int | None = None  # records that are taken at most


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

    What is in `out` does not belong to a source that contains it.
    """
    if not files.is_url(source):
        source = os.path.expanduser(source)
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
    chosen = _record_files(source, folder, paths)
    *stems, other = distinct_stems([*map(_stem, chosen), "unnamed"])
    record_files = [
        _record_file(path, stem, form, options) for path, stem in zip(chosen, stems, strict=True)
    ]
    media = [path for path in paths if captions.media_type(path)]
    if media and files.name(chosen[0]) in _METADATA:
        entries = partial(_folder_entries, record_files, media, other)
    else:
        entries = partial(_record_entries, record_files)
    return OpenSource(form, [file.path for file in record_files], entries)


def _form(source: str, folder: bool, paths: list[str]) -> str:
    """One of FORMS, or `records`: files of records, each with a form of its own."""
    names = {files.name(path) for path in paths}
    if _INFO in names:
        return "llamafactory"
    if any(_is_tar(path) for path in paths):
        return "webdataset"
    if not folder or names.intersection(_METADATA):
        return "records"
    if captions.is_captioned(paths):
        return "captions"
    if any(files.suffix(path) in files.RECORD_SUFFIXES for path in paths):
        return "records"
    if any(captions.media_type(path) for path in paths):
        return "captions"
    raise ShardError(
        f"{source}: no JSON file, table, shard, picture or video there: give records "
        f"({', '.join(sorted(files.RECORD_SUFFIXES))}), a folder of media with .txt captions, "
        "or shards"
    )


def _is_tar(path: str) -> bool:
    return files.suffix(path) in files.TAR_SUFFIXES or files.name(path).endswith(".tar.gz")


def _record_files(source: str, folder: bool, paths: list[str]) -> list[str]:
    """The files of records: an image folder's metadata, else those on top, else all."""
    metadata = [path for path in paths if files.name(path) in _METADATA]
    with_records = [
        path for path in paths if files.suffix(path) in files.RECORD_SUFFIXES or not folder
    ]
    on_top = [path for path in with_records if files.parent(path) == source.rstrip("/")]
    chosen = metadata or on_top or with_records
    if not chosen:
        raise ShardError(f"{source}: no file of records there: {', '.join(files.RECORD_SUFFIXES)}")
    return chosen


def _record_file(path: str, stem: str, form: str, options: SourceOptions) -> RecordFile:
    base = options.media_dir or files.parent(path)
    form = form if form in (*RECORD_FORMS, "table") else _record_form(path, options)
    if form == "table" and (record := first_record(path)):
        captions.check_columns(record, options.media_column, options.caption_column)
    convert: Convert = RECORD_FORMS.get(form) or partial(
        captions.table_draft,
        media_column=options.media_column,
        caption_column=options.caption_column,
    )
    return RecordFile(path, stem, base, convert)


def _stem(path: str) -> str:
    """A file's name without its suffix; for an image folder's metadata.jsonl that of the folder."""
    name = files.name(path)
    return files.name(files.parent(path)) if name in _METADATA else name.rpartition(".")[0]


def _record_form(path: str, options: SourceOptions) -> str:
    record = first_record(path)
    if options.media_column or options.caption_column:
        return "table"
    if conversation.looks_like_one(record) or not record:
        return "sharegpt"
    if "instruction" in record:
        return "alpaca"
    if captions.looks_like_a_table(record):
        return "table"
    if "text" in record:
        return "text"
    raise ShardError(
        f"{path}: keys {', '.join(map(str, record))}: not of a known form: give --form "
        f"({', '.join([*RECORD_FORMS, 'table'])}), or a table's --media-column and --caption-column"
    )


def _llama_factory(source: str, folder: bool, options: SourceOptions) -> OpenSource:
    info = files.join(source, _INFO) if folder else source
    base = options.media_dir or files.parent(info)
    parts: list[tuple[llama_factory.DataSet, str]] = []
    rejected: list[tuple[str, SampleError]] = []
    for data_set in llama_factory.read_info(info, options.datasets):
        if isinstance(data_set, tuple):
            rejected.append(data_set)
        else:
            file = data_set.file
            inside = files.list_files(file) if files.is_folder(file) else [file]
            parts += [(data_set, path) for path in inside]
    stems = distinct_stems([data_set.name for data_set, _ in parts])
    record_files = [
        RecordFile(path, stem, base, data_set.draft, data_set.limit)
        for (data_set, path), stem in zip(parts, stems, strict=True)
    ]

    def entries() -> Iterator[Entry]:
        yield from _record_entries(record_files)
        for name, reason in rejected:
            yield Entry(name, _INFO, 1.0, reason)

    return OpenSource("llamafactory", [info, *(file.path for file in record_files)], entries)


def _record_entries(record_files: list[RecordFile]) -> Iterator[Entry]:
    for at, record_file in enumerate(record_files):
        name = files.name(record_file.path)
        for record in itertools.islice(read_records(record_file.path), record_file.limit):
            yield Entry(
                key=f"{record_file.stem}-{record.number:06d}",
                file=name,
                share=(at + record.share) / len(record_files),
                draft=_draft_or_reason(record.value, record_file),
            )


def _folder_entries(record_files: list[RecordFile], media: list[str], stem: str) -> Iterator[Entry]:
    """The records of an image folder's metadata, then a rejection for each medium without one."""
    named: set[str] = set()
    for entry in _record_entries(record_files):
        if isinstance(entry.draft, Draft):
            paths = [medium.content for medium in entry.draft.media]
            named.update(os.path.normpath(path) for path in paths if isinstance(path, str))
        yield entry
    left = [path for path in media if os.path.normpath(path) not in named]
    for number, path in enumerate(left):
        reason = SampleError("missing_caption", "no record of the metadata names it")
        yield Entry(f"{stem}-{number:06d}", files.name(path), 1.0, reason)


def _draft_or_reason(
    value: dict[str, Any] | SampleError, record_file: RecordFile
) -> Draft | SampleError:
    if isinstance(value, SampleError):
        return value
    try:
        return record_file.convert(value, record_file.base)
    except SampleError as error:
        return error
    except MemoryError:
        raise
    except Exception as error:  # whatever a strange value leads to: one record ends no import
        return SampleError("bad_schema", f"{type(error).__name__}: {error}: {value!r:.200}")
