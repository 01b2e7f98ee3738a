"""Bytes of object stores and servers through fsspec: `s3://`, `gs://`, `hf://`, `https://`, ...

Requests that fail on the network are repeated; those for files that are not there are not.
"""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec

from data_pipeline.fields import number

_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> the extra of ours that brings it
_LONGEST_PAUSE = 30.0  # seconds
_GONE = 410  # HTTP: not there any more
_LATER = (408, 425, 429)  # HTTP: not yet, or too many requests
# In a URL: a user's name and password, and fields of a query that are as good as these.
_USER = re.compile(r"://(?:[^/?#\s]*|[^/@:\[\s]*:(?!\d+[/?#])[^@\s]*)@")
_SECRET = re.compile(
    r"([?&](?:[\w-]*[-_])?(?:access|api)?"
    r"(?:pass|passwd|password|pwd|token|secret|signature|credential|key|auth|sig)=)[^&#\s]+",
    re.IGNORECASE,
)
# What says that a file is another one now, by the name that each protocol has for it.
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "mtime", "created")

_Result = TypeVar("_Result")


class StoreError(OSError):
    """A store that cannot be read: one line, which names the URL."""


class GoneError(StoreError):
    """What a URL names is not there, or may not be read."""


class ForbiddenError(GoneError):
    """The file may not be read."""


class PackageError(GoneError):
    """Reading the file takes a package that is not installed."""


class _UnfitError(Exception):
    """A server that cannot do what reading its files takes: to ask again changes nothing."""


@dataclass
class StoreOptions:
    """How object stores are read."""

    # Folder of the local cache, shared by all processes of a machine; "": one below /tmp.
    cache: str = ""
    # GB (10^9 bytes) of it at most; what was used longest ago goes first.
    cache_size: float = number(20.0, least=0, zero="no cache")
    # Microbatches of each loader process, or records of an import, that are fetched before their
    # turn comes.
    read_ahead: int = number(8, least=0, zero="none")
    retries: int = number(6, least=0, zero="none")  # of a request that fails
    timeout: float = number(60.0, above=0)  # seconds that a server may not answer


RETRIES = StoreOptions().retries


def is_url(path: str) -> bool:
    return "://" in path


def without_secrets(text: str) -> str:
    """URLs in a text as people may see them: logs are passed on."""
    return _SECRET.sub(r"\1***", _USER.sub("://***@", text))


def set_timeout(seconds: float) -> None:
    """Seconds without an answer after which a request fails, in this process and its children."""
    import aiohttp

    silence = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
    web = {"client_kwargs": {"timeout": silence}}
    store = {"config_kwargs": {"connect_timeout": seconds, "read_timeout": seconds}}
    fsspec.config.conf.update({"http": web, "https": web, "s3": store})


def answered(error: Exception) -> Exception:
    """What went wrong with a web server, where fsspec took that for a file that is not there: it
    does so with any status, and with a connection that is refused or lost."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    import aiohttp

    if isinstance(cause, aiohttp.ClientConnectionError):
        # Of a name that no server has any more the files are gone.
        return error if getattr(cause, "errno", None) == socket.EAI_NONAME else cause
    return cause if getattr(cause, "status", 404) not in (404, _GONE) else error


def refusal(error: Exception) -> int:
    """The status of a web server that will not answer otherwise when it is asked again; 0: it may,
    or it is no such error."""
    status = getattr(error, "status", 0)  # of aiohttp
    return status if isinstance(status, int) and 400 <= status < 500 and status not in _LATER else 0


def missing_package(url: str, error: ImportError) -> str:
    extra = _EXTRAS.get(url.partition("://")[0])
    advice = f"pip install 'moss-train[{extra}]'" if extra else str(error)
    return f"{without_secrets(url)}: its protocol needs another package: {advice}"


def read(
    url: str, first: int | None = None, end: int | None = None, retries: int = RETRIES
) -> bytes:
    """Bytes `first` up to `end` of a file, all of them without; StoreError."""

    def request() -> bytes:
        system, path = fsspec.core.url_to_fs(url)
        data: bytes = system.cat_file(path, start=first, end=end)
        if first is not None and end is not None:
            if len(data) > end - first:
                raise _UnfitError("the server sends the whole file where a part of it is asked for "
                                  "(HTTP ranges): use another one, or copy the folder")  # fmt: skip
            if len(data) < end - first:
                raise OSError(f"{len(data)} bytes came of {end - first}")
        return data

    return _persistently(url, request, retries)


def describe(url: str, retries: int = RETRIES) -> tuple[int, str]:
    """Size of a file, and what changes when it becomes another one; StoreError."""

    def request() -> tuple[int, str]:
        system, path = fsspec.core.url_to_fs(url)
        about: dict[str, Any] = system.info(path)
        if about.get("size") is None:
            raise _UnfitError("the server does not say how long the file is: use another one, or "
                              "copy the folder")  # fmt: skip
        version = next((about[name] for name in _VERSIONS if about.get(name)), "")
        return int(about["size"]), str(version).strip('"')

    return _persistently(url, request, retries)


def names(folder: str, retries: int = RETRIES) -> list[str]:
    """The names of what is directly in a folder; StoreError."""

    def request() -> list[str]:
        system, path = fsspec.core.url_to_fs(folder)
        system.invalidate_cache()
        return [name.rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False)]

    return _persistently(folder, request, retries)


def _persistently(url: str, request: Callable[[], _Result], retries: int) -> _Result:
    name = without_secrets(url)
    for attempt in range(retries + 1):
        try:
            return request()
        except _UnfitError as error:
            raise StoreError(f"{name} cannot be read: {error}") from None
        except ImportError as error:
            raise PackageError(missing_package(url, error)) from None
        except Exception as error:  # every protocol has errors of its own
            answer = answered(error)
            # fsspec raises FileNotFoundError for a web server that does not answer, too.
            silent = isinstance(error.__cause__, TimeoutError)
            if (isinstance(answer, FileNotFoundError) and not silent) or refusal(answer) == _GONE:
                raise GoneError(f"{name} does not exist") from None
            detail = without_secrets(str(answer))
            if isinstance(answer, PermissionError) or refusal(answer) in (401, 403):
                raise ForbiddenError(f"{name} may not be read: {detail}") from None
            if refusal(answer):
                raise StoreError(f"{name} cannot be read: {detail}") from None
            reason = f"{type(answer).__name__}: {detail}"
            reason = "the server does not answer" if silent else reason
        if attempt < retries:
            pause = min(0.25 * 2**attempt, _LONGEST_PAUSE)
            time.sleep(pause * random.uniform(0.5, 1.0))  # not all ranks at once
    raise StoreError(f"{name} cannot be read, tried {retries + 1} times: {reason}")
