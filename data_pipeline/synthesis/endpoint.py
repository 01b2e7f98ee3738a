"""Requests over HTTP: one chat completion, tried again with growing pauses, as JSON or text."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from data_pipeline.synthesis.config import EndpointConfig
from data_pipeline.synthesis.prompts import Request

SEEDS = 1000  # of a request: a reply that cannot be used is asked for again with seed + SEEDS
_AGAIN = frozenset({408, 409, 425, 429})  # and 500 to 599
_LOST = 8  # requests that fail in a row before a server is given up; more with more at a time
_FATAL = frozenset({401, 402, 403, 404, 405})
_FALLBACK = {"schema": "object", "object": "text"}

Tokens = tuple[int, int]  # of the prompt, of the reply


class EndpointError(Exception):
    """A server that cannot be used at all: no request will succeed."""


class RequestFailed(Exception):
    """A request has failed as often as it may."""


class _Retry(Exception):
    """A try that failed; `after`: seconds that the server asks to wait."""

    def __init__(self, why: str, after: float = 0.0, unusable: bool = False) -> None:
        super().__init__(why)
        self.after, self.unusable = after, unusable


@dataclass
class Counts:
    """tries: requests that were sent. failed: of them, those without a usable reply."""

    tries: int = 0
    failed: int = 0


class Endpoint:
    """Sends requests; `wasted` is told the tokens of replies that cannot be used."""

    def __init__(self, config: EndpointConfig, wasted: Callable[[str, Tokens], None]) -> None:
        self.counts = Counts()
        self._config, self._wasted = config, wasted
        self._form = "schema" if config.json_form == "auto" else config.json_form
        self._resume = 0.0  # on the monotonic clock: until then a server wants no requests
        self._answered = False
        self._lost = 0  # requests that failed one after the other
        self._jitter = random.Random()
        key = os.environ.get(config.api_key_env, "")
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=config.timeout),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            connector=aiohttp.TCPConnector(limit=config.concurrency),
            trust_env=True,  # proxies
        )

    async def close(self) -> None:
        await self._session.close()

    async def ask(self, request: Request) -> tuple[Any, Tokens]:
        """The reply, JSON of the request's schema or a text, and its tokens.

        Raises RequestFailed after `retries`, EndpointError where no request can succeed.
        """
        seed, room, why = request.seed, request.max_tokens, ""
        for attempt in range(self._config.retries + 1):
            await self._pause(self._resume - time.monotonic())
            try:
                reply = await self._once(request, seed, room)
                self._lost = 0
                return reply
            except _Retry as failed:
                self.counts.failed += 1
                why = str(failed)
                if failed.unusable:  # the same seed could give the same reply
                    seed, room = seed + SEEDS, room * 2 if "cut off" in why else room
                if failed.after:
                    self._resume = max(self._resume, time.monotonic() + failed.after)
            if not self._answered and attempt == 2 and "no connection" in why:
                raise EndpointError(f"{request.url}: {why}: start the server or correct the URL")
            if attempt < self._config.retries:
                most = min(self._config.backoff * 2**attempt, self._config.max_wait)
                await self._pause(most * self._jitter.uniform(0.5, 1.0))
        self._lost += 1
        why = f"{self._config.retries + 1} tries: {why}"
        if self._lost > max(_LOST, self._config.concurrency):
            raise EndpointError(f"{request.url}: {self._lost} requests failed in a row: {why}")
        raise RequestFailed(f"{request.kind}: {why}")

    @staticmethod
    async def _pause(seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)

    async def _once(self, request: Request, seed: int, room: int) -> tuple[Any, Tokens]:
        self.counts.tries += 1
        form = self._form
        url = f"{request.url.rstrip('/')}/chat/completions"
        try:
            async with self._session.post(url, json=_body(request, form, seed, room)) as answer:
                said = await answer.text(errors="replace")
        except aiohttp.ClientConnectorError as error:
            raise _Retry(f"no connection ({error})") from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _Retry(type(error).__name__) from None
        if answer.status != 200:
            after = _retry_after(answer.headers.get("Retry-After", ""))
            self._refused(request, form, answer.status, said[:300], after)
        self._answered = True
        tokens, text, cut = _parts(said, request)
        try:
            reply = text if request.schema is None else _json(text)
            request.check(reply)
        except ValueError as error:
            self._wasted(request.kind, tokens)
            why = "the reply was cut off" if cut else f"an unusable reply: {error}"
            raise _Retry(why, unusable=True) from None
        return reply, tokens

    def _refused(self, request: Request, form: str, status: int, text: str, after: float) -> None:
        """Raises what a status that is not 200 means."""
        said = f"HTTP {status}: {text}"
        if status in _AGAIN or status >= 500:
            raise _Retry(said, after)
        if status in _FATAL:
            raise EndpointError(f"{request.url}, model {request.model}: {said}")
        auto = self._config.json_form == "auto" and request.schema is not None
        fallback = _FALLBACK.get(form) if auto else None
        if fallback and any(word in text for word in ("response_format", "json_schema",
                                                            "json_object", "guided")):  # fmt: skip
            self._form = fallback if self._form == form else self._form
            raise _Retry(said)
        raise RequestFailed(f"{request.kind}: {said}")


def _body(request: Request, form: str, seed: int, room: int) -> dict[str, Any]:
    content = list(request.content)
    if request.schema is not None and form != "schema":
        schema = json.dumps(request.schema)
        content.append({"type": "text", "text": f"Reply with JSON of this schema: {schema}"})
    texts = [part["text"] for part in content if part["type"] == "text"]
    only_text = len(texts) == len(content)  # servers of text models may know no parts
    system = [{"role": "system", "content": request.system}] if request.system else []
    user = {"role": "user", "content": "\n\n".join(texts) if only_text else content}
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [*system, user],
        "temperature": request.temperature,
        "max_tokens": room,
        "seed": seed,
    }
    if request.schema is None:
        return body
    if form == "schema":
        inner = {"name": request.kind, "schema": request.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": inner}
    elif form == "object":
        body["response_format"] = {"type": "json_object"}
    return body


def _parts(said: str, request: Request) -> tuple[Tokens, str, bool]:
    """Tokens, text, and whether the text was cut off, of a chat completion."""
    try:
        data = json.loads(said)
        choice = data["choices"][0]
        text = choice["message"]["content"] or ""
        used = data.get("usage") or {}
        tokens = (int(used.get("prompt_tokens", request.tokens)),
                  int(used.get("completion_tokens", len(text) // 4)))  # fmt: skip
        return tokens, text, choice.get("finish_reason") == "length"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Retry(f"not a chat completion: {error!r:.100}", unusable=True) from None


def _json(text: str) -> Any:
    """The JSON object of a reply, also from between other words or fences; ValueError."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise ValueError(f"no JSON object in {text[:100]!r}")
    return json.loads(text[start : end + 1])


def _retry_after(value: str) -> float:
    """Seconds of a Retry-After header: a number, or a date."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
