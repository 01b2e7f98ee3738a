"""Reads files of records (JSON, JSONL, CSV, TSV, parquet), one record at a time."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_pipeline import files
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError

csv.field_size_limit(2**31 - 1)


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


def first_record(path: str) -> dict[str, Any]:
    """The first record that can be read, empty where there is none."""
    records = itertools.islice(read_records(path), 100)
    return next((record.value for record in records if isinstance(record.value, dict)), {})


def _json(file: BinaryIO, path: str, size: int) -> Iterator[tuple[Any, float]]:
    start = file.readline()
    form = files.encoding(start)
    if form != "utf-8":  # in UTF-16 a line's end is another byte
        try:
            text = (start + file.read()).decode(form)
        except UnicodeDecodeError as error:
            raise ShardError(f"{path}: byte {error.start} is no {form}: save it as UTF-8") from None
        file = io.BytesIO(text.encode(errors="surrogatepass"))
        start, size = file.readline(), len(file.getbuffer())
    while start and not start.strip():
        start = file.readline()
    if start.lstrip().startswith(b"[") or not _is_json(start):
        yield from _json_list(start + file.read(), path)
        return
    at = 0
    for line in itertools.chain([start], file):
        at += len(line)
        if line.strip():
            yield _line(line), min(1.0, at / size) if size else 0.0


def _is_json(line: bytes) -> bool:
    return not isinstance(_line(line), SampleError)


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return SampleError("bad_json", str(error))


def _json_list(data: bytes, path: str) -> Iterator[tuple[Any, float]]:
    try:
        records = json.loads(data)
    except (ValueError, RecursionError) as error:
        if files.suffix(path) == ".jsonl":  # only its first line is bad
            yield from ((_line(line), 0.0) for line in data.splitlines() if line.strip())
            return
        raise ShardError(f"{path} cannot be read: {error}") from None
    if not isinstance(records, list):
        raise ShardError(f"{path}: expected a list of records")
    for number, record in enumerate(records):
        yield record, (number + 1) / len(records)


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
