"""Reads parquet and arrow files, a few rows at a time, and unfolds the columns of tables.

What is damaged of a file that begins well costs its own rows: each is a SampleError.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from data_pipeline import files
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from data_pipeline.strict_json import loads

_ROWS = 64  # that are made into records at a time
# Fields that are lists or objects, or, in tables, the JSON of one.
_EVENTS = frozenset({"question", "response"})
_NESTED = _EVENTS | {
    "messages", "conversations", "conversation", "videos", "images", "segments", "words",
    "narrations", "subtitles", "texts", "history", "captions", "sentences",
}  # fmt: skip
Selects = Callable[[int], bool]
Values = Iterator[tuple[Any, float]]


def read_parquet(file: BinaryIO, path: str, size: int, selects: Selects) -> Values:
    """Of a row group that is damaged, the rows from the damage on are SampleErrors."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ShardError(f"{path} cannot be read: {error}") from None
    total, at = table.metadata.num_rows or 1, 0
    for group in range(table.num_row_groups):
        end = at + table.metadata.row_group(group).num_rows
        if not any(map(selects, range(at, end))):
            yield from itertools.repeat((None, end / total), end - at)
            at = end
            continue
        try:
            for batch in table.iter_batches(batch_size=_ROWS, row_groups=[group]):
                for record in _records(batch):
                    at += 1
                    yield record, at / total
        except (pyarrow.ArrowException, OSError) as error:
            if at == 0 or _of_storage(error, path):
                raise ShardError(f"{path} cannot be read: {error}") from None
            damage = SampleError("unreadable_file", f"{path}: row group {group}: {error}")
            yield from itertools.repeat((damage, end / total), end - at)
            at = end


def read_arrow(file: BinaryIO, path: str, size: int, selects: Selects) -> Values:
    """What Hugging Face's datasets save to disk: a stream of batches, or several that were joined;
    or a file of them. What is behind damage is one SampleError."""
    import pyarrow

    at = 0
    try:
        for batch in _batches(file):
            share = min(1.0, file.tell() / size) if size else 0.0
            for first in range(0, batch.num_rows, _ROWS):
                rows = batch.slice(first, _ROWS)
                places = range(at, at + rows.num_rows)
                at = places.stop
                if any(map(selects, places)):
                    yield from ((record, share) for record in _records(rows))
                else:
                    yield from itertools.repeat((None, share), rows.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        if at == 0 or _of_storage(error, path):
            raise ShardError(f"{path} cannot be read: {error}") from None
        yield SampleError("unreadable_file", f"{path}: after {at} rows: {error}"), 1.0


def _of_storage(error: Exception, path: str) -> bool:
    """Whether it says nothing of the file."""
    return files.is_url(path) or getattr(error, "errno", None) is not None


def _batches(file: BinaryIO) -> Iterator[Any]:
    import pyarrow

    if file.peek(6)[:6] == b"ARROW1":  # type: ignore[attr-defined]
        opened = pyarrow.ipc.open_file(file)
        yield from map(opened.get_batch, range(opened.num_record_batches))
        return
    while file.peek(1):  # type: ignore[attr-defined]
        yield from pyarrow.ipc.open_stream(file)


def _records(rows: Any) -> Iterator[dict[str, Any] | SampleError]:
    """The rows of a batch; one whose text is not UTF-8 is a SampleError."""
    try:
        yield from map(unfolded, rows.to_pylist())
    except UnicodeDecodeError:
        for row in range(rows.num_rows):
            try:
                yield unfolded(rows.slice(row, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                yield SampleError("bad_text", f"byte {error.start} of a text is not UTF-8")


def unfolded(record: dict[str, Any]) -> dict[str, Any]:
    """A row with the lists and objects of which a table has the JSON."""
    opened = {
        name: value
        for name, text in record.items()
        if name in _NESTED and isinstance(text, str) and (value := _nested(text)) is not None
    }
    if len(_EVENTS & opened.keys()) == 1:  # a prompt or an answer that is JSON itself
        opened = {name: value for name, value in opened.items() if name not in _EVENTS}
    return record | opened


def _nested(text: str) -> Any:
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return loads(text)
    except (ValueError, RecursionError):  # told by the form that wants it
        return None
