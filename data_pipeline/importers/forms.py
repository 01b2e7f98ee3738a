"""Finds the form of a source, and gives its records one after the other.

A form of your own is a function in RECORD_FORMS, and, to be recognized without --form, a line in
`KNOWN` of recognize.py: docs/extending.md adds one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline import files
from data_pipeline.fields import check_values, number
from data_pipeline.importers import (
    captions,
    conversation,
    llama_factory,
    pairs,
    published,
    segments,
    speech,
    streaming,
    transcripts,
)
from data_pipeline.importers.by_lists import answers_beside
from data_pipeline.importers.draft import Convert, Draft, Entry, distinct_stems
from data_pipeline.importers.entries import (
    RecordFile,
    Refusal,
    Splits,
    drafts_or_reason,
    folder_entries,
    record_entries,
)
from data_pipeline.importers.fingerprint import fingerprint
from data_pipeline.importers.layout import (
    INFO,
    METADATA,
    form_of_files,
    is_records,
    is_tar,
    record_files,
    unread,
    with_kinds,
)
from data_pipeline.importers.media_column import TABLE, usual_names, with_column
from data_pipeline.importers.recognize import form_beside, form_of_all, nearest
from data_pipeline.importers.records import first_records
from data_pipeline.importers.share import Share
from data_pipeline.importers.webdataset import shard_entries
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError

# The forms of records, and what turns one (and the folder of its media) into a draft.
RECORD_FORMS: dict[str, Convert] = {
    "sharegpt": conversation.conversation_draft,
    "alpaca": llama_factory.alpaca_draft,
    "text": captions.plain_draft,
    "moss-vl": segments.mossvl_draft,
    "realtime-qa": segments.realtime_qa_draft,
    "streamo": streaming.streamo_draft,
    "streamo-stream": streaming.frames_draft,
    "joyai": streaming.joyai_draft,
    "livechat": streaming.livechat_draft,
    "narrations": speech.narration_draft,
    "speech": speech.speech_draft,
    "moments": published.moments_draft,
    "vqa": published.vqa_draft,
    "webvid": published.webvid_draft,
    "cauldron": pairs.cauldron_draft,
    "ms-swift": pairs.swift_draft,
    "videochat": pairs.videochat_draft,
    "pairs": pairs.pair_draft,
}
WITHOUT_RECORDS = ("transcripts", "captions", "webdataset")
FORMS = (*RECORD_FORMS, "table", "llamafactory", *WITHOUT_RECORDS)


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read; None: as its files tell."""

    form: str | None = None
    media_dir: str | None = None  # what the media paths of records are relative to
    datasets: tuple[str, ...] = ()  # of a dataset_info.json; none: all
    splits: tuple[str, ...] = ()  # of records that say theirs; none: all
    media_column: str | None = None
    caption_column: str | None = None
    window: int = number(speech.WINDOW, above=0)  # seconds of a sample of commentary, at most

    def __post_init__(self) -> None:
        check_values(self)


Entries = Callable[[Share], Iterator[Entry]]


@dataclass(frozen=True)
class OpenSource:
    """A source whose form is known. `entries` starts at its first record at each call, and gives
    those of a part."""

    form: str
    files: list[str]
    entries: Entries
    found: tuple[str, ...] = ()  # the forms of its records
    unread: tuple[str, ...] = ()  # files beside them that look like data
    answers: tuple[str, ...] = ()  # files that the answers to the records' questions are read from
    left_out: Counter[str] = field(default_factory=Counter)  # records of splits that are not wanted

    def fingerprint(self) -> str:
        """Changes with the names, sizes and contents of the source's files."""
        paths = [*self.files, *self.answers]
        looked_at = [path for path in paths if self._is_looked_at(path)]
        return f"{len(self.files)} files, {fingerprint(paths, looked_at)}"

    def _is_looked_at(self, path: str) -> bool:
        """Of a folder of media the texts are, of shards those on a disk: others are too many to
        ask for the size of each."""
        if self.form == "captions":
            return files.suffix(path) == ".txt" and not files.is_url(path)
        return self.form != "webdataset" or not files.is_url(path)


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
    form = options.form or form_of_files(source, folder, paths)
    splits = Splits(options.splits, Counter()) if options.splits else None
    opened = _opened(source, folder, paths, form, options, splits)
    if splits is not None:
        if opened.form in WITHOUT_RECORDS:
            raise ShardError(f"--split: {source} is {opened.form}, without records that say theirs")
        opened = replace(opened, left_out=splits.left_out)
    roots = {options.media_dir, *map(files.parent, opened.files)} if opened.found else set()
    return replace(opened, unread=unread(paths, opened.files, roots))


def _opened(
    source: str,
    folder: bool,
    paths: list[str],
    form: str,
    options: SourceOptions,
    splits: Splits | None,
) -> OpenSource:
    plain = any(map(is_records, paths))
    in_shards = form in RECORD_FORMS and not plain and any(map(is_tar, paths))
    if form == "captions":
        if not folder or not any(captions.media_type(path) for path in paths):
            raise ShardError(f"{source}: expected a folder of pictures or videos")
        entries = partial(captions.folder_entries, source, paths)
        return OpenSource(form, paths, _by_key(entries))
    if form == "webdataset" or in_shards:
        tars = [path for path in paths if is_tar(path)]
        named = form if in_shards else None
        return OpenSource(
            "webdataset", tars, partial(shard_entries, tars, _converts(options), named)
        )
    if form == "transcripts":
        return _transcripts(source, folder, paths, options)
    if form == "llamafactory":
        return _llama_factory(source, folder, options, splits)
    chosen, refused = _record_files(record_files(source, folder, paths), form, options)
    media = [path for path in paths if captions.media_type(path)]
    of_part: Entries = partial(record_entries, chosen, refused=refused, splits=splits)
    if media and files.name(chosen[0].path) in METADATA:
        of_part = partial(folder_entries, chosen, refused, media, splits)
    found = tuple(sorted({file.form for file in chosen if file.has_records}))
    read = [*(file.path for file in chosen), *(refusal.path for refusal in refused)]
    return OpenSource(form, read, of_part, found, answers=answers_beside(read))


def _by_key(entries: Callable[[], Iterator[Entry]]) -> Entries:
    """The entries of a part where it takes all of them to know which they are."""
    return lambda share: (entry for entry in entries() if share.has(entry.key))


def _record_files(
    groups: list[list[str]], form: str, options: SourceOptions
) -> tuple[list[RecordFile], list[Refusal]]:
    """The files of the first group with one that has records, and of this and the groups before it
    those that cannot be read; ShardError where there is none.

    On a server a file that cannot be read says nothing about the file: it is a ShardError.
    """
    stems = iter(distinct_stems([_stem(path) for group in groups for path in group]))
    opened: list[RecordFile] = []
    refused: list[Refusal] = []
    errors: list[ShardError] = []
    for group in groups:
        for path, stem in zip(group, stems, strict=False):
            try:
                opened.append(_record_file(path, stem, form, options))
            except ShardError as error:
                if files.is_url(path):
                    raise
                error = with_kinds(error, path)
                errors.append(error)
                refused.append(Refusal(path, stem, SampleError("unreadable_file", str(error))))
        if any(file.has_records for file in opened):
            break
    if not opened:
        raise errors[0]
    return opened, refused


def _record_file(path: str, stem: str, form: str, options: SourceOptions) -> RecordFile:
    base = options.media_dir or files.parent(path)
    records = first_records(path)
    named = form in (*RECORD_FORMS, TABLE)
    form = form if named else _record_form(path, records, options)
    if form == TABLE and records:
        captions.check_columns(path, records[0], options.media_column, options.caption_column)
    converts = _converts(options)
    if named:
        return RecordFile(path, stem, base, converts[form], form, has_records=bool(records))

    def convert(record: dict[str, Any], base: str) -> Draft | list[Draft]:
        renamed = usual_names(record, options.media_column)
        return converts[form_beside(renamed, form)](record, base)

    return RecordFile(path, stem, base, convert, form, has_records=bool(records))


def _converts(options: SourceOptions) -> dict[str, Convert]:
    """What makes drafts of a record, by its form."""
    converts: dict[str, Convert] = {
        **RECORD_FORMS,
        "narrations": partial(speech.narration_draft, window=options.window),
        "speech": partial(speech.speech_draft, window=options.window),
        "moments": partial(published.moments_draft, window=options.window),
        "table": partial(
            captions.table_draft,
            media_column=options.media_column,
            caption_column=options.caption_column,
        ),
    }
    return with_column(converts, options.media_column)


def _stem(path: str) -> str:
    """A file's name without its suffix; for an image folder's metadata.jsonl that of the folder."""
    name = files.name(path)
    if name in METADATA:
        return files.name(files.parent(path))
    return name[: name.rfind(files.record_suffix(path))]


def _record_form(path: str, records: list[dict[str, Any]], options: SourceOptions) -> str:
    if options.caption_column:
        return TABLE
    if not records:
        return TABLE if options.media_column else "sharegpt"
    form = form_of_all([usual_names(record, options.media_column) for record in records])
    if options.media_column and form in (None, "text"):
        return TABLE
    if form is not None:
        return form
    raise ShardError(
        f"{path}: fields {', '.join(map(str, records[0]))}: not a known form. The nearest: "
        f"{nearest(records[0])}. Rename the fields, or give --form "
        f"({', '.join([*RECORD_FORMS, 'table'])}), or a table's --media-column and --caption-column"
    )


def _transcripts(source: str, folder: bool, paths: list[str], options: SourceOptions) -> OpenSource:
    """Transcripts and the videos of their names, beside them or in the folder of the media."""
    elsewhere = options.media_dir or (None if folder else files.parent(source))
    around = files.list_files(elsewhere) if elsewhere else []
    found = transcripts.once(transcripts.pairs(paths))
    if elsewhere:
        by_stem = {transcripts.stems(p)[0]: p for p in around if captions.media_type(p)}
        found = [
            (path, next((by_stem[s] for s in transcripts.stems(path) if s in by_stem), video))
            for path, video in found
        ]
    if not found:
        raise ShardError(f"{source}: no .srt, .vtt or whisper's .json with a video of its name")
    stems = distinct_stems([_stem(path) for path, _ in found])

    def entries() -> Iterator[Entry]:
        for at, ((path, video), stem) in enumerate(zip(found, stems, strict=True)):
            drafts = drafts_or_reason(lambda p=path, v=video: speech.transcript_draft(  # type: ignore[misc]
                *transcripts.read_transcript(p, v), options.window))  # fmt: skip
            for part, draft in enumerate(drafts):
                key = f"{stem}-{part:06d}"
                yield Entry(key, files.name(path), (at + 1) / len(found), draft)

    paths = [path for path, _ in found]
    return OpenSource("transcripts", paths, _by_key(entries), ("transcripts",))


def _llama_factory(
    source: str, folder: bool, options: SourceOptions, splits: Splits | None
) -> OpenSource:
    info = files.join(source, INFO) if folder else source
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
        RecordFile(path, stem, base, data_set.draft, data_set.form, data_set.limit)
        for (data_set, path), stem in zip(parts, stems, strict=True)
    ]

    def entries(share: Share) -> Iterator[Entry]:
        yield from record_entries(record_files, share, splits=splits)
        for name, reason in rejected:
            if share.has(name):
                yield Entry(name, INFO, 1.0, reason)

    return OpenSource("llamafactory", [info, *(file.path for file in record_files)], entries)
