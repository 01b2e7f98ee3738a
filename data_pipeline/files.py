"""Files by path or URL: local ones directly, `https://` through fsspec, those of object stores
(`s3://`, `gs://`, `hf://`, ...) through their local cache.

A URL is taken for a folder where its name does not end like a file that we read (`.json`, `.tar`,
...): the server is not asked.
"""

from __future__ import annotations

import gzip
import io
import os
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec

from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError
from data_pipeline.stored_files import StoredFiles
from data_pipeline.stores import (
    ForbiddenError,
    GoneError,
    PackageError,
    StoreError,
    StoreOptions,
    answered,
    is_url,
    missing_package,
    refusal,
    without_secrets,
)

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
RECORD_SUFFIXES = frozenset({
    ".json", ".jsonl", ".ndjson", ".jsonlines", ".csv", ".tsv", ".parquet", ".arrow",
})  # fmt: skip
TAR_SUFFIXES = frozenset({".tar", ".tgz"})

# What a compressed file begins with.
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_SUFFIXES = (".gz", ".zst")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # what a pointer to a file begins with
NOT_FETCHED = "is a pointer of Git LFS, not the file: fetch it (git lfs pull)"

_RETRY_AFTER = (1.0, 4.0)  # seconds


_stored: StoredFiles | None = None


def use_stores(options: StoreOptions) -> None:
    """How this process and its children read stores and servers from now on."""
    global _stored
    _stored = StoredFiles(options)


def _stores() -> StoredFiles:
    if _stored is None:
        use_stores(StoreOptions())
    assert _stored is not None
    return _stored


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a local file only says where Git LFS has the file."""
    with Path(path).open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def in_store(path: str) -> bool:
    """Whether a URL is one of a store, which says which version of a file it has."""
    return is_url(path) and not path.startswith(("http://", "https://"))


def version(path: str) -> str:
    """A name of what is in a file of a store now; ShardError where the file is not there."""
    with _explained(path):
        return _stores().about(path).name


def fetch(path: str) -> None:
    """Brings a file of a store into the cache; what fails is told when the file is read."""
    with suppress(StoreError):
        _stores().read(_stores().about(path))


def join(folder: str, path: str) -> str:
    """`path` seen from `folder` ("" is the working one); a URL or absolute path stays as it is."""
    if not folder or is_url(path) or path.startswith("/"):
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


def composed(path: str) -> str:
    """A name as it compares: macOS writes an accent as a sign of its own."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def record_suffix(path: str) -> str:
    """The suffix of a file of records without that of its compression: `.jsonl` of `a.jsonl.gz`."""
    own = suffix(path)
    return suffix(name(path)[: -len(own)]) if own in _COMPRESSED_SUFFIXES else own


def is_folder(path: str) -> bool:
    if not is_url(path):
        return Path(path).is_dir()
    return suffix(path) not in RECORD_SUFFIXES.union(TAR_SUFFIXES, _COMPRESSED_SUFFIXES)


def list_files(folder: str) -> list[str]:
    """All files below a folder, sorted, hidden ones left out; ShardError where it is not there."""
    if is_url(folder):
        with _explained(folder):
            system, inside = fsspec.core.url_to_fs(folder)
            listed = [system.unstrip_protocol(path) for path in system.find(inside)]
        return sorted(path for path in listed if not name(path).startswith(".") and "?" not in path)
    if not Path(folder).is_dir():
        raise ShardError(f"{folder} is not a folder: correct the path")
    paths, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(base))
        # A link to a folder that is walked already leads round in a circle.
        folders[:] = sorted(
            inner
            for inner in folders
            if not inner.startswith(".") and os.path.realpath(os.path.join(base, inner)) not in seen
        )
        paths += [os.path.join(base, name) for name in names if not name.startswith(".")]
    return sorted(paths)


def file_size(path: str) -> int:
    """Bytes, 0 where a server does not tell; ShardError where the file is not there."""
    with _explained(path):
        if not is_url(path):
            return os.path.getsize(path)
        if in_store(path):
            return _stores().about(path).size
        system, inside = fsspec.core.url_to_fs(path)
        return int(system.size(inside) or 0)


@contextmanager
def open_records(path: str) -> Iterator[tuple[BinaryIO, int]]:
    """A file of records, unpacked where it is compressed, and its bytes; 0: nobody knows how many.

    Raises ShardError.
    """
    with open_file(path) as file:
        start = file.peek(len(LFS_POINTER))  # type: ignore[attr-defined]
        if start.startswith(LFS_POINTER):
            raise ShardError(f"{path} {NOT_FETCHED}")
        packed = next((kind for mark, kind in _COMPRESSED.items() if start.startswith(mark)), None)
        if packed is None:
            yield file, file_size(path)
        elif packed == "gzip":
            with gzip.open(file) as inner:
                yield cast(BinaryIO, inner), 0
        else:
            import pyarrow

            with pyarrow.CompressedInputStream(file, packed) as unpacked:
                yield cast(BinaryIO, io.BufferedReader(unpacked)), 0


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """A file of records, opened for reading; ShardError where that fails."""
    # Local ones not through fsspec, which reads a meaning into names with `::`.
    with _explained(path), _opened(path) as file:
        # fsspec's own files read no line in pieces.
        web = is_url(path) and not in_store(path)
        yield cast(BinaryIO, io.BufferedReader(file) if web else file)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    if in_store(path):
        with _stores().open(path) as stored:
            yield stored
    elif is_url(path):
        with fsspec.open(path) as web:
            yield web
    else:
        with Path(path).open("rb") as file:
            yield file


def read_bytes(path: str) -> bytes:
    """A whole file; SampleError `missing_file`, `empty_file` or `unreadable_file`, ShardError.

    What fails on its way over a network is asked for again before it is given up.
    """
    data = _stored_bytes(path) if in_store(path) else _web_or_local_bytes(path)
    if not data:
        raise SampleError("empty_file", f"{path} has 0 bytes")
    if data.startswith(LFS_POINTER):
        raise SampleError("unreadable_file", f"{path} {NOT_FETCHED}")
    return data


def _stored_bytes(path: str) -> bytes:
    try:
        return _stores().read(_stores().about(path))
    except PackageError as error:
        raise ShardError(str(error)) from None
    except ForbiddenError as error:
        raise SampleError("unreadable_file", str(error)) from None
    except GoneError:
        raise SampleError("missing_file", f"{path}: No such file or directory") from None
    except StoreError as error:
        raise SampleError("unreadable_file", str(error)) from None


def _web_or_local_bytes(path: str) -> bytes:
    for pause in (*_RETRY_AFTER, None):
        try:
            return _read(path)
        except ImportError as error:
            raise ShardError(missing_package(path, error)) from None
        except Exception as error:  # every protocol has errors of its own
            answer = answered(error)
            # fsspec raises FileNotFoundError for a web server that does not answer, too.
            silent = isinstance(error.__cause__, TimeoutError)
            if isinstance(answer, FileNotFoundError) and not silent:
                detail = f"{without_secrets(path)}: No such file or directory"
                raise SampleError("missing_file", detail) from None
            final = isinstance(answer, PermissionError) or refusal(answer)
            if is_url(path) and pause is not None and not final:
                time.sleep(pause)
                continue
            reason = "the server does not answer" if silent else without_secrets(str(answer))
            detail = f"{name(path)}: {reason}"
            raise SampleError("unreadable_file", detail) from None
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
    """A text file's bytes, in UTF-8 or as its byte order mark says, with plain line ends.

    Raises SampleError(`bad_text`).
    """
    try:
        return data.decode(encoding(data)).replace("\r\n", "\n")
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
    except GoneError as error:
        advice = "" if isinstance(error, PackageError) else ": correct the path"
        raise ShardError(f"{error}{advice}") from None
    except StoreError as error:
        raise ShardError(str(error)) from None
    except FileNotFoundError as error:
        cause = answered(error)
        wrong = "does not exist: correct the path" if cause is error else f"cannot be read: {cause}"
        raise ShardError(without_secrets(f"{path} {wrong}")) from None
    except ImportError as error:
        raise ShardError(missing_package(path, error)) from None
    except ShardError:
        raise
    except Exception as error:
        # Every protocol has errors of its own; of a local file's, others are the reader's.
        if not is_url(path) and not isinstance(error, OSError | ValueError):
            raise
        raise ShardError(without_secrets(f"{path} cannot be read: {error}")) from None
