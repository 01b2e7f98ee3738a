"""Files by path or URL: local ones directly, `s3://`, `gs://`, `https://`, ... through fsspec.

A URL is taken for a folder where its name does not end like a file that we read (`.json`, `.tar`,
...): the server is not asked.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast
from urllib.parse import urlsplit

import fsspec

from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from data_pipeline.stores import is_url, missing_package

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff",
    ".jp2", ".pgm", ".ppm",
})  # fmt: skip
VIDEO_SUFFIXES = frozenset({
    ".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".flv", ".wmv", ".3gp", ".ogv",
})  # fmt: skip
# Pictures that may be a sequence of them.
ANIMATED_SUFFIXES = frozenset({".gif", ".webp", ".apng", ".avif"})
RECORD_SUFFIXES = frozenset({".json", ".jsonl", ".csv", ".tsv", ".parquet"})
TAR_SUFFIXES = frozenset({".tar", ".tgz"})

_RETRY_AFTER = (1.0, 4.0)  # seconds


def join(folder: str, path: str) -> str:
    """`path` seen from `folder`; a URL or an absolute path stands for itself."""
    if is_url(path) or path.startswith("/"):
        return path
    return f"{folder.rstrip('/')}/{path}"


def parent(path: str) -> str:
    return path.rstrip("/").rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def name(path: str) -> str:
    """The last part, without a URL's query."""
    return PurePosixPath(urlsplit(path).path if is_url(path) else path).name


def suffix(path: str) -> str:
    """`.jpg`, lower case."""
    return PurePosixPath(name(path)).suffix.lower()


def is_folder(path: str) -> bool:
    if not is_url(path):
        return Path(path).is_dir()
    return suffix(path) not in RECORD_SUFFIXES | TAR_SUFFIXES | {".gz"}


def list_files(folder: str) -> list[str]:
    """All files below a folder, sorted, hidden ones left out; ShardError where it is not there."""
    if is_url(folder):
        with _explained(folder):
            system, inside = fsspec.core.url_to_fs(folder)
            listed = [system.unstrip_protocol(path) for path in system.find(inside)]
        return sorted(path for path in listed if not name(path).startswith(".") and "?" not in path)
    if not Path(folder).is_dir():
        raise ShardError(f"{folder} is not a folder: correct the path")
    paths = []
    for base, folders, names in os.walk(folder):
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        paths += [os.path.join(base, name) for name in names if not name.startswith(".")]
    return sorted(paths)


def file_size(path: str) -> int:
    """Bytes, 0 where a server does not tell; ShardError where the file is not there."""
    with _explained(path):
        if not is_url(path):
            return os.path.getsize(path)
        system, inside = fsspec.core.url_to_fs(path)
        return int(system.size(inside) or 0)


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file of records, opened for reading; ShardError where that fails."""
    # Local ones not through fsspec, which reads a meaning into names with `::`.
    with (
        _explained(path),
        fsspec.open(path, "rb") if is_url(path) else Path(path).open("rb") as file,
    ):
        # fsspec's own files read no line in pieces.
        yield cast(BinaryIO, io.BufferedReader(file) if is_url(path) else file)


def read_bytes(path: str) -> bytes:
    """A whole file; SampleError `missing_file`, `empty_file` or `unreadable_file`, ShardError.

    What fails on its way over a network is asked for again before it is given up.
    """
    for pause in (*_RETRY_AFTER, None):
        try:
            data = _read(path)
        except ImportError as error:
            raise ShardError(missing_package(path, error)) from None
        except Exception as error:  # every protocol has errors of its own
            # fsspec raises FileNotFoundError for a web server that does not answer, too.
            silent = isinstance(error.__cause__, TimeoutError)
            if isinstance(error, FileNotFoundError) and not silent:
                detail = f"{path}: No such file or directory"
                raise SampleError("missing_file", detail) from None
            if is_url(path) and pause is not None and not isinstance(error, PermissionError):
                time.sleep(pause)
                continue
            detail = f"{name(path)}: {'the server does not answer' if silent else error}"
            raise SampleError("unreadable_file", detail) from None
        if not data:
            raise SampleError("empty_file", f"{path} has 0 bytes")
        return data
    raise AssertionError("unreachable")


# The longer ones first: UTF-32's starts with UTF-16's.
_MARKS = {
    b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip


def encoding(data: bytes) -> str:
    """What the byte order mark at the start of a text says, `utf-8` without one."""
    return next((found for mark, found in _MARKS.items() if data.startswith(mark)), "utf-8")


def decode_text(data: bytes, file: str) -> str:
    """A text file's bytes, in UTF-8 or as its byte order mark says; SampleError(`bad_text`)."""
    try:
        return data.decode(encoding(data))
    except UnicodeDecodeError as error:
        raise SampleError(
            "bad_text",
            f"{file}: byte {error.start} ({data[error.start]:#04x}) is not {error.encoding}: "
            "save the file as UTF-8",
        ) from None


def _read(path: str) -> bytes:
    if not is_url(path):
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        return cast(bytes, file.read())


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what opening a source can raise into ShardError."""
    try:
        yield
    except FileNotFoundError:
        raise ShardError(f"{path} does not exist: correct the path") from None
    except ImportError as error:
        raise ShardError(missing_package(path, error)) from None
    except ShardError:
        raise
    except Exception as error:
        # Every protocol has errors of its own; of a local file's, others are the reader's.
        if not is_url(path) and not isinstance(error, OSError | ValueError):
            raise
        raise ShardError(f"{path} cannot be read: {error}") from None
