"""Questions to a server, several at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from inference.evaluate.harness.server import MODEL

_TRIES, _PAUSE, _TIMEOUT = 5, 1.0, 1800.0  # seconds
_AGAIN = (408, 429, 500, 502, 503, 504)
Thing = TypeVar("Thing")
Found = TypeVar("Found")


class RequestFailed(Exception):
    """A question without an answer, after several tries; the text says why."""


@dataclass(frozen=True)
class Asking:
    """How to ask. url: of the server, without a path."""

    url: str
    max_tokens: int = 1024
    temperature: float = 0.0


def answer(asking: Asking, content: list[dict[str, Any]]) -> str:
    """The model's answer to a user's message of parts as OpenAI's API has them; RequestFailed."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": asking.max_tokens,
        "temperature": asking.temperature,
    }
    said = ""
    for number in range(_TRIES):
        if number:
            time.sleep(_PAUSE * number)
        try:
            found = httpx.post(f"{asking.url}/v1/chat/completions", json=body, timeout=_TIMEOUT)
        except httpx.HTTPError as error:
            said = f"{type(error).__name__}: {error}"
            continue
        if found.status_code == 200:
            return str(found.json()["choices"][0]["message"]["content"])
        said = f"HTTP {found.status_code}: {found.text:.300}"
        if found.status_code not in _AGAIN:
            break
    raise RequestFailed(said)


def each(
    things: Iterable[Thing], work: Callable[[Thing], Found], concurrency: int
) -> Generator[Found, None, None]:
    """What `work` finds for each, in their order; closing it leaves out those not yet begun."""
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="moss-ask")
    try:
        yield from pool.map(work, things)
    finally:
        pool.shutdown(cancel_futures=True)
