"""Reads files of records (JSON, JSONL, CSV, TSV, parquet, arrow), one record at a time."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_pipeline import files
from data_pipeline.importers.by_ids import by_ids, place_of_records, records_by_id, top_of
from data_pipeline.importers.by_lines import is_moment, records_of_moments
from data_pipeline.importers.by_lists import in_large_lists, in_lists, lists_of
from data_pipeline.importers.columnar import Selects, read_arrow, read_parquet, unfolded
from data_pipeline.importers.draft import surely_medium
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from data_pipeline.strict_json import Decoder, loads

csv.field_size_limit(2**31 - 1)
_CHUNK = 1 << 16  # characters that are read at a time from a list of records
_LONGEST_RECORD = 1 << 28  # characters
_LARGE = 1 << 26  # bytes of an object from which on it is not read whole
_IN_QUOTES = re.compile(r'"(?:[^"]|"")*"')  # a field of a table
_BETWEEN = re.compile("[ \t\r\n,\ufeff]*")  # elements of a list, and files that were joined
_TURNS = ("messages", "conversations", "conversation", "texts")
_BY_LINE = (".jsonl", ".ndjson", ".jsonlines")


@dataclass(frozen=True)
class Record:
    """A record of a file; `value` is a SampleError where the record cannot be read."""

    number: int  # its place in the file, from 0
    value: dict[str, Any] | SampleError
    share: float  # of the file read so far, 0..1


def read_records(path: str, selects: Selects | None = None) -> Iterator[Record]:
    """The records of a file, by its suffix; ShardError where the file as a whole cannot be read.

    selects: by its place in the file, whether a record is read; the others are left out, not read
    where the form of the file allows it.
    """
    selects = selects or _all
    readers = {
        ".csv": _csv, ".tsv": _csv, ".txt": _text, ".parquet": read_parquet, ".arrow": read_arrow,
    }  # fmt: skip
    read = readers.get(files.record_suffix(path), _json)
    with files.open_records(path) as (file, size):
        if not file.peek(1):  # type: ignore[attr-defined]
            read = _empty
        for number, (value, share) in enumerate(_to_the_end(read(file, path, size, selects), path)):
            if not selects(number):
                continue
            if not isinstance(value, dict | SampleError):
                kind = type(value).__name__
                value = SampleError("bad_schema", f"a record must be an object, not a {kind}")
            yield Record(number, _with_turns(value), share)


def _with_turns(value: dict[str, Any] | SampleError) -> dict[str, Any] | SampleError:
    """A record whose turns are objects, which Hugging Face's datasets store as an object of lists:
    `{"role": [...], "content": [...]}`."""
    for name in _TURNS if isinstance(value, dict) else ():
        lists = value.get(name)  # type: ignore[union-attr]
        if isinstance(lists, dict) and lists and all(isinstance(v, list) for v in lists.values()):
            if len({len(column) for column in lists.values()}) > 1:
                return SampleError("bad_schema", f"{name}: its lists have different lengths")
            rows = zip(*lists.values(), strict=True)
            value = value | {name: [dict(zip(lists, row, strict=True)) for row in rows]}  # type: ignore[operator]
    return value


def _to_the_end(values: Iterator[tuple[Any, float]], path: str) -> Iterator[tuple[Any, float]]:
    """What a reader gives; a compressed file that is cut off or damaged ends with a SampleError."""
    try:
        yield from values
    except (EOFError, zlib.error, OSError) as error:
        of_storage = files.is_url(path) or getattr(error, "errno", None) is not None
        if isinstance(error, OSError) and of_storage:
            raise
        yield SampleError("unreadable_file", f"{path}: {error}: it is cut off or damaged"), 1.0


def _empty(file: BinaryIO, path: str, size: int, selects: Selects) -> Iterator[tuple[Any, float]]:
    yield SampleError("empty_file", f"{path} has 0 bytes"), 1.0


def _all(number: int) -> bool:
    return True


def first_records(path: str, most: int = 100) -> list[dict[str, Any]]:
    """The objects among a file's first `most` records."""
    records = itertools.islice(read_records(path), most)
    return [record.value for record in records if isinstance(record.value, dict)]


def _json(file: BinaryIO, path: str, size: int, selects: Selects) -> Iterator[tuple[Any, float]]:
    start = file.readline(_CHUNK)  # a whole file may be one line
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
        start = file.readline(_CHUNK)
    lines, in_list = files.record_suffix(path) in _BY_LINE, start.lstrip().startswith(b"[")
    if not in_list or lines:
        start = _rest_of_line(start, file, _LONGEST_RECORD if lines else _LARGE)
    if in_list and not (lines and _is_record(_line(start))):
        yield from _elements(start, file, path, size)
    elif lines and start.strip() == b"{":  # as jq writes them, each over several lines
        yield from _elements(start, file, path, size, listed=False)
    elif lines:
        yield from _json_lines(itertools.chain([start], file), size, selects)
    elif len(start) > _LARGE or isinstance(_line(start), SampleError):
        kinds = top_of(path) if size > _LARGE or not size else {}
        if lists := lists_of(kinds):
            yield from in_large_lists(path, lists, size)
        elif (inside := place_of_records(path, kinds)) is not None:
            yield from by_ids(path, inside, size)
        else:
            yield from _whole(start + file.read(), path)
    else:
        after = next((line for line in file if line.strip()), None)
        if after is None:
            yield from _whole(start, path)
        else:
            yield from _json_lines(itertools.chain([start, after], file), size, selects)


def _rest_of_line(start: bytes, file: BinaryIO, most: int) -> bytes:
    return start if start.endswith(b"\n") else start + file.readline(most)


def _json_lines(lines: Iterable[bytes], size: int, selects: Selects) -> Iterator[tuple[Any, float]]:
    at = number = 0
    for line in lines:
        at += len(line)
        if line.strip():
            value = _as_record(_line(line)) if selects(number) else None
            number += 1
            yield value, min(1.0, at / size) if size else 0.0


def _line(line: bytes) -> Any:
    try:
        return loads(line)
    except (ValueError, RecursionError) as error:
        if line.rstrip().endswith(b"},"):  # of a list without its brackets
            return _line(line.rstrip()[:-1])
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


def _elements(
    start: bytes, file: BinaryIO, path: str, size: int, listed: bool = True
) -> Iterator[tuple[Any, float]]:
    """The elements of a list that may be larger than memory, one after the other; of files that
    were joined (`cat a.json b.json`) those of each list.

    listed: False: values that stand in no list, over any number of lines each.
    """
    decoder, scan = codecs.getincrementaldecoder("utf-8")("surrogateescape"), Decoder()
    text, at = decoder.decode(start).lstrip(), int(listed)
    read, found, ended, inside = len(start), 0, False, True
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if listed and text.startswith("]" if inside else "[", at):
            at, inside = at + 1, not inside
            continue
        if not (listed and inside) and at == len(text) and ended:
            return
        try:
            value, end = scan.raw_decode(text, at) if inside and at < len(text) else (None, at)
            error: Exception | None = None
        except (ValueError, RecursionError) as problem:
            value, end, error = None, at, problem
        if end > at and (end < len(text) or ended):
            at, found = end, found + 1
            repeated = scan.repeated()
            value = SampleError("bad_json", repeated) if repeated else _as_record(value)
            yield value, min(1.0, read / size) if size else 0.0
            continue
        text, at = text[at:], 0
        behind = bool(text) and not inside
        if behind or ended or len(text) > _LONGEST_RECORD or isinstance(error, RecursionError):
            what = "more behind the end of the list" if behind else error or "no end"
            damage = SampleError("bad_json", f"after {found} records: {what}")
            if not found:
                raise ShardError(f"{path} cannot be read: {damage.detail}")
            yield damage, 1.0
            return
        chunk = file.read(max(_CHUNK, len(text)))
        read, ended = read + len(chunk), not chunk
        text += decoder.decode(chunk, final=ended)


def _whole(data: bytes, path: str) -> Iterator[tuple[Any, float]]:
    """One record, or an object that has the records by their ids or in lists."""
    try:
        value = loads(data)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data") and data.lstrip().startswith(b"{"):  # the next one
            yield from _elements(data, io.BytesIO(), path, len(data), listed=False)
            return
        raise ShardError(f"{path} cannot be read: {error}") from None
    records = [value]
    if isinstance(value, dict):
        listed = in_lists(value, path)
        records = list(records_by_id(value, path) if listed is None else listed)
    for number, record in enumerate(records):
        yield record, (number + 1) / len(records)


def _text(file: BinaryIO, path: str, size: int, selects: Selects) -> Iterator[tuple[Any, float]]:
    """A table, as Flickr8k's captions.txt is one, JSON, or lines of moments."""
    start = file.peek(_CHUNK)[:_CHUNK]  # type: ignore[attr-defined]
    form = files.encoding(start)
    start = start.decode("utf-8-sig" if form == "utf-8" else form, errors="ignore").lstrip()
    if is_moment(start.partition("\n")[0]):
        for record in records_of_moments(file.read(), path):
            yield record, 1.0
        return
    read = _json if start.startswith(("{", "[")) else _csv
    yield from read(file, path, size, selects)


def _csv(file: BinaryIO, path: str, size: int, selects: Selects) -> Iterator[tuple[Any, float]]:
    form = files.encoding(file.peek(4)[:4])  # type: ignore[attr-defined]
    form = "utf-8-sig" if form == "utf-8" else form
    # A byte that is no UTF-8 costs its row.
    text = io.TextIOWrapper(file, encoding=form, newline="", errors="surrogateescape")
    first = text.readline()
    lines = _Lines(first, text, _delimiter(first, path))
    reader = csv.DictReader(lines, delimiter=lines.delimiter)
    try:
        columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        if twice := [name for name in columns if name and columns.count(name) > 1]:
            raise ShardError(f"{path}: two columns are called {twice[0]!r}: rename one")
        if rows := [name for name in columns if files.is_url(name) or surely_medium(name)]:
            detail = f"the first line has {rows[0]!r:.80}, and no names of columns"
            raise ShardError(f"{path}: {detail}: write one before it, like file_name,caption")
        begins = 2  # the record's first line
        for record in reader:
            share = min(1.0, file.tell() / size) if size else 0.0
            if lines.ended:
                detail = f"line {begins}: a quote is not closed up to the file's end: correct it"
                yield SampleError("bad_csv", detail), share
            elif None in record or None in record.values():
                width = len(columns)
                yield SampleError("bad_csv", f"line {reader.line_num}: not {width} fields"), share
            elif strange := [name for name, value in record.items() if not _is_unicode(value)]:
                detail = f"line {reader.line_num}, {strange[0]}: not {form}: save the file as UTF-8"
                yield SampleError("bad_text", detail), share
            else:
                yield unfolded(record), share
            begins = reader.line_num + 1
    except (csv.Error, UnicodeError) as error:
        raise ShardError(f"{path}: line {reader.line_num + 1}: {error}") from None
    finally:
        text.detach()  # or the wrapper would close the file


class _Lines:
    """The lines of a table, as csv.reader takes them. ended: it wanted more than there are.

    Tables with tabs are often written without quoting. There a quote that opens a field and does
    not close it is part of the text if the line has all fields, and so has the next one.
    """

    def __init__(self, first: str, rest: Iterable[str], delimiter: str) -> None:
        self.delimiter, self.ended = delimiter, False
        self._lines = itertools.chain([first], rest)
        self._tabs = first.count("\t") if delimiter == "\t" else 0

    def __iter__(self) -> Iterator[str]:
        line = next(self._lines, None)
        while line is not None:
            following = next(self._lines, None)
            whole = following is None or following.count("\t") == self._tabs
            if '"' in line and whole and self._tabs and line.count("\t") == self._tabs:
                line = "\t".join(map(_closed, line.rstrip("\r\n").split("\t"))) + "\n"
            yield line
            line = following
        self.ended = True


def _closed(field: str) -> str:
    if not field.startswith('"') or _IN_QUOTES.fullmatch(field):
        return field
    return '"' + field.replace('"', '""') + '"'


def _delimiter(header: str, path: str) -> str:
    if files.record_suffix(path) == ".tsv":
        return "\t"
    return next((sign for sign in ",;\t|" if sign in header), ",")


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\udc80" <= sign <= "\udcff" for sign in text)
