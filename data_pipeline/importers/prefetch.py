"""Fetches the media of the next records while earlier ones are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from data_pipeline import files
from data_pipeline.importers.draft import Draft, Entry
from data_pipeline.stored_files import AT_ONCE
from data_pipeline.stores import StoreOptions

_KNOWN = 1024  # URLs


def read_ahead(entries: Iterable[Entry], options: StoreOptions) -> Iterator[Entry]:
    """The same entries; the media of the next `read_ahead` are on their way into the cache.

    An entry comes when its own media are there, so that no worker fetches them once more.
    """
    if not options.read_ahead or not options.cache_size:
        yield from entries
        return
    waiting: deque[Entry] = deque()
    coming: dict[str, Future[None]] = {}  # by URL: a clip that many records show comes once
    threads = ThreadPoolExecutor(AT_ONCE)
    try:
        for entry in entries:
            waiting.append(entry)
            for url in _stored(entry):
                if url not in coming:
                    coming[url] = threads.submit(files.fetch, url)
            if len(waiting) > options.read_ahead:
                yield _there(waiting.popleft(), coming)
        while waiting:
            yield _there(waiting.popleft(), coming)
    finally:
        threads.shutdown(cancel_futures=True)


def _stored(entry: Entry) -> list[str]:
    media = entry.draft.media if isinstance(entry.draft, Draft) else []
    return [m.content for m in media if isinstance(m.content, str) and files.in_store(m.content)]


def _there(entry: Entry, coming: dict[str, Future[None]]) -> Entry:
    for url in _stored(entry):
        if url in coming:
            coming[url].result()
    if len(coming) > _KNOWN:
        for url in [url for url, fetched in coming.items() if fetched.done()]:
            del coming[url]
    return entry
