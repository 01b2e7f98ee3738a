"""Reads files of records (JSON, JSONL, CSV, TSV, parquet), one record at a time."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_pipeline import files
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError

csv.field_size_limit(2**31 - 1)
_CHUNK = 1 << 16  # characters that are read at a time from a list of records
_LONGEST_RECORD = 1 << 28  # characters
# Fields of a record, none of which is an id.
_FIELDS = frozenset({
    "messages", "conversations", "conversation", "question", "response", "segments", "words",
    "images", "videos", "narrations", "content", "subtitles",
})  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A record of a file; `value` is a SampleError where the record cannot be read."""

    number: int  # its place in the file, from 0
    value: dict[str, Any] | SampleError
    share: float  # of the file read so far, 0..1


def read_records(path: str) -> Iterator[Record]:
    """The records of a file, by its suffix; ShardError where the file as a whole cannot be read."""
    readers = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    read = readers.get(files.suffix(path), _json)
    size = files.file_size(path)
    with files.open_file(path) as file:
        for number, (value, share) in enumerate(read(file, path, size)):
            if not isinstance(value, dict | SampleError):
                kind = type(value).__name__
                value = SampleError("bad_schema", f"a record must be an object, not a {kind}")
            yield Record(number, value, share)


def first_records(path: str, most: int = 100) -> list[dict[str, Any]]:
    """Those of the first records that can be read."""
    records = itertools.islice(read_records(path), most)
    return [record.value for record in records if isinstance(record.value, dict)]


def _json(file: BinaryIO, path: str, size: int) -> Iterator[tuple[Any, float]]:
    start = file.readline()
    form = files.encoding(start)
    if form == "utf-8-sig":
        start = start.removeprefix(codecs.BOM_UTF8)
    elif form != "utf-8":  # in UTF-16 a line's end is another byte
        try:
            text = (start + file.read()).decode(form)
        except UnicodeDecodeError as error:
            raise ShardError(f"{path}: byte {error.start} is no {form}: save it as UTF-8") from None
        file = io.BytesIO(text.encode(errors="surrogatepass"))
        start, size = file.readline(), len(file.getbuffer())
    while start and not start.strip():
        start = file.readline()
    lines = files.suffix(path) == ".jsonl"
    if start.lstrip().startswith(b"[") and not (lines and _is_record(_line(start))):
        yield from _elements(start, file, path, size)
    elif lines:
        yield from _json_lines(itertools.chain([start], file), size)
    elif isinstance(_line(start), SampleError):
        yield from _whole(start + file.read(), path)
    else:
        after = next((line for line in file if line.strip()), None)
        if after is None:
            yield from _whole(start, path)
        else:
            yield from _json_lines(itertools.chain([start, after], file), size)


def _json_lines(lines: Iterable[bytes], size: int) -> Iterator[tuple[Any, float]]:
    at = 0
    for line in lines:
        at += len(line)
        if line.strip():
            yield _as_record(_line(line)), min(1.0, at / size) if size else 0.0


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return SampleError("bad_json", str(error))


def _is_record(value: Any) -> bool:
    """Whether a list is the messages of one record, as in LiveCC's lines."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(entry, dict) and "role" in entry for entry in value
    )  # fmt: skip


def _as_record(value: Any) -> Any:
    if _is_record(value):
        return {"messages": value}
    if isinstance(value, list) and value and all(isinstance(entry, int) for entry in value):
        return SampleError("index_line", "the places of a file's lines, as LiveCC's last line has")
    return value


def _elements(start: bytes, file: BinaryIO, path: str, size: int) -> Iterator[tuple[Any, float]]:
    """The elements of a list that may be larger than memory, one after the other."""
    decoder, scan = codecs.getincrementaldecoder("utf-8")("surrogateescape"), json.JSONDecoder()
    text = decoder.decode(start).lstrip()[1:]
    read, found, ended = len(start), 0, False
    while True:
        text = text.lstrip(" \t\r\n,")
        if text.startswith("]"):
            return
        try:
            value, end = scan.raw_decode(text) if text else (None, 0)
            error: Exception | None = None
        except (ValueError, RecursionError) as problem:
            value, end, error = None, 0, problem
        if end > 0 and (end < len(text) or ended):
            text, found = text[end:], found + 1
            yield _as_record(value), min(1.0, read / size) if size else 0.0
            continue
        if ended or len(text) > _LONGEST_RECORD or isinstance(error, RecursionError):
            damage = SampleError("bad_json", f"after {found} records: {error or 'no end'}")
            if not found:
                raise ShardError(f"{path} cannot be read: {damage.detail}")
            yield damage, 1.0
            return
        chunk = file.read(max(_CHUNK, len(text)))
        read, ended = read + len(chunk), not chunk
        text += decoder.decode(chunk, final=ended)


def _whole(data: bytes, path: str) -> Iterator[tuple[Any, float]]:
    """One record, or an object that has the records by their ids, on one line or many."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from None
    records = list(_by_id(value)) if isinstance(value, dict) else [value]
    for number, record in enumerate(records):
        yield record, (number + 1) / len(records)


def _by_id(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Ego4D's `{"videos": {id: {...}}}`, VideoLLM-online's `{id: {...}}`, or one record."""
    inner = value["videos"] if isinstance(value.get("videos"), dict) else value
    if not inner or _FIELDS & set(inner) or not all(
        isinstance(entry, dict | list) for entry in inner.values()
    ):  # fmt: skip
        yield value
        return
    for name, entry in inner.items():
        fields = entry if isinstance(entry, dict) else {"narrations": entry}
        yield {"video_uid": name} | fields


def _csv(file: BinaryIO, path: str, size: int) -> Iterator[tuple[Any, float]]:
    form = files.encoding(file.read(4))
    file.seek(0)
    form = "utf-8-sig" if form == "utf-8" else form
    text = io.TextIOWrapper(file, encoding=form, newline="")
    delimiter = "\t" if files.suffix(path) == ".tsv" else ","
    reader = csv.DictReader(text, delimiter=delimiter)
    width = len(reader.fieldnames or ())
    try:
        for record in reader:
            share = min(1.0, file.tell() / size) if size else 0.0
            if None in record or None in record.values():
                yield SampleError("bad_csv", f"line {reader.line_num}: not {width} fields"), share
            else:
                yield dict(record), share
    except (csv.Error, UnicodeDecodeError) as error:
        raise ShardError(f"{path}: line {reader.line_num + 1}: {error}") from None
    finally:
        text.detach()  # or the wrapper would close the file


def _parquet(file: BinaryIO, path: str, size: int) -> Iterator[tuple[Any, float]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        total, at = table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=64):
            for record in batch.to_pylist():
                at += 1
                yield record, at / total
    except (pyarrow.ArrowException, OSError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from None
