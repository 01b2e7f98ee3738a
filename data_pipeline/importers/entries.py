"""Reads the records of files one after the other: each as an entry, with its draft or why not."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from data_pipeline import files
from data_pipeline.importers.draft import (
    Convert,
    Draft,
    Entry,
    as_list,
    distinct_stems,
)
from data_pipeline.importers.locate import Finder
from data_pipeline.importers.records import read_records
from data_pipeline.importers.share import WHOLE, Share
from data_pipeline.importers.unwanted import refuse_unwanted
from data_pipeline.schema import SampleError

# Under which names a record says of which split it is (the second is YouCook2's), and how files do.
_SPLITS = ("split", "subset")
_SPLIT_OF_FILE = re.compile(r"(train|training|val|valid|validation|dev|test|testing)(?=[-_.]|$)")
_KNOWN_IDS = 1 << 18  # of a file, 25 MB of memory: it may have any number of records


@dataclass(frozen=True)
class RecordFile:
    """A file of records, and what turns one into drafts."""

    path: str
    stem: str  # what the keys of its records start with
    base: str  # the folder of its media
    convert: Convert
    form: str
    limit: int | None = None  # records that are taken at most
    has_records: bool = True  # else `form` is a guess


@dataclass(frozen=True)
class Refusal:
    """A file that cannot be read, or has no known form, among others that can."""

    path: str
    stem: str
    reason: SampleError


@dataclass(frozen=True)
class Splits:
    """The splits whose records are taken; of others the records are counted."""

    names: tuple[str, ...]
    left_out: Counter[str]

    def select(self, value: dict[str, Any], path: str) -> dict[str, Any] | SampleError | None:
        """The record, None where it is of another split; a SampleError where it does not say, nor
        the name of its file or folder."""
        values = [value[name] for name in _SPLITS if name in value]
        names = [name for name in values if isinstance(name, str) and name.strip()]
        folder = files.name(files.parent(path))
        if begins := _SPLIT_OF_FILE.match(files.name(path)):
            names.append(begins[1])
        if _SPLIT_OF_FILE.fullmatch(folder):
            names.append(folder)
        # Numbers are names, too, where nothing else is: the classes of Hugging Face's datasets.
        names += [str(name) for name in values if type(name) is int]
        if not names:
            detail = (
                f"--split: the record has no {' or '.join(_SPLITS)} that is a name or number, and "
                "neither its file nor the folder is called after one: leave --split away"
            )
            return SampleError("bad_schema", detail)
        if names[0] in self.names:
            # `split` means nothing else, `subset` may be part of a path.
            return {key: v for key, v in value.items() if key != _SPLITS[0]}
        self.left_out[f"record of the split {names[0]}, left out"] += 1
        return None


def record_entries(
    record_files: list[RecordFile],
    share: Share = WHOLE,
    refused: Sequence[Refusal] = (),
    splits: Splits | None = None,
) -> Iterator[Entry]:
    for at, record_file in enumerate(record_files):
        name, finder = files.name(record_file.path), Finder(record_file.base)
        ids: set[int] = set()
        for record in read_records(record_file.path, partial(share.has_record, record_file.stem)):
            if record_file.limit is not None and record.number >= record_file.limit:
                break
            value: dict[str, Any] | SampleError | None = record.value
            again = _repeated_id(record.value, ids)
            if splits is not None and isinstance(value, dict):
                value = splits.select(value, record_file.path)
            drafts = [] if value is None else _record_drafts(value, record_file)
            for part, draft in enumerate(drafts):
                if isinstance(draft, Draft):
                    draft = finder.placed(replace(draft, notes=draft.notes + again))
                yield Entry(
                    key=f"{record_file.stem}-{record.number:06d}" + (f"-{part}" if part else ""),
                    file=name,
                    share=(at + record.share) / len(record_files),
                    draft=draft,
                )

    for one in refused:
        if share.has(one.stem):
            yield Entry(f"{one.stem}-000000", files.name(one.path), 1.0, one.reason)


def _repeated_id(value: dict[str, Any] | SampleError, ids: set[int]) -> tuple[str, ...]:
    """A note for a record whose `id` another one has, too, of the first _KNOWN_IDS."""
    own = value.get("id") if isinstance(value, dict) else None
    if not isinstance(own, str | int) or own == "":
        return ()
    repeated = hash(own) in ids
    if len(ids) < _KNOWN_IDS:
        ids.add(hash(own))
    return ("id of an earlier record",) if repeated else ()


def folder_entries(
    record_files: list[RecordFile],
    refused: list[Refusal],
    media: list[str],
    splits: Splits | None = None,
    share: Share = WHOLE,
) -> Iterator[Entry]:
    """The records of an image folder's metadata, then a rejection for each medium without one.

    Of a part, which takes all records to know which media have one, the entries of that part; what
    is left out is counted by the first part.
    """
    if splits is not None and share.number:
        splits = replace(splits, left_out=Counter())
    entries = _whole_folder(record_files, refused, media, splits)
    return (entry for entry in entries if share.has(entry.key))


def _whole_folder(
    record_files: list[RecordFile], refused: list[Refusal], media: list[str], splits: Splits | None
) -> Iterator[Entry]:
    named: set[str] = set()
    *_, stem = distinct_stems([*(file.stem for file in record_files), "unnamed"])
    for entry in record_entries(record_files, refused=refused, splits=splits):
        if isinstance(entry.draft, Draft):
            paths = [medium.content for medium in entry.draft.media]
            named.update(os.path.normpath(path) for path in paths if isinstance(path, str))
        yield entry
    left = [path for path in media if os.path.normpath(path) not in named]
    if splits is not None:  # of other splits, or of none
        if left:
            note = "picture or video that no record of the splits names, left out"
            splits.left_out[note] += len(left)
        return
    for place, path in enumerate(left):
        reason = SampleError("missing_caption", "no record of the metadata names it")
        yield Entry(f"{stem}-{place:06d}", files.name(path), 1.0, reason)


def _record_drafts(
    value: dict[str, Any] | SampleError, record_file: RecordFile
) -> list[Draft | SampleError]:
    if isinstance(value, SampleError):
        return [value]

    def made() -> Draft | list[Draft]:
        refuse_unwanted(value, plain=record_file.form in ("text", "table"))
        return record_file.convert(value, record_file.base)

    return drafts_or_reason(made, value)


def drafts_or_reason(
    made: Callable[[], Draft | list[Draft]], value: object = ""
) -> list[Draft | SampleError]:
    try:
        drafts = made()
    except SampleError as error:
        return [error]
    except MemoryError:
        raise
    except Exception as error:  # whatever a strange value leads to: one record ends no import
        return [SampleError("bad_schema", f"{type(error).__name__}: {error}: {value!r:.200}")]
    return as_list(drafts)
