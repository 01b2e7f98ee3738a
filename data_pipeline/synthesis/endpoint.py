"""Sends requests over HTTP as chat completions, and retries them with growing pauses."""

from __future__ import annotations

import asyncio
import json
import logging
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

SEEDS = 1000  # a request whose reply cannot be used is sent again with seed + SEEDS
_AGAIN = frozenset({408, 409, 425, 429})  # statuses to retry, besides 500 to 599
_LOST = 8  # failed requests in a row after which a server is given up, or `concurrency` if larger
_FATAL = frozenset({401, 402, 403, 404, 405})  # statuses with which no request will succeed
_FALLBACK = {"schema": "object", "object": "text"}  # the json_form after one that is refused

logger = logging.getLogger(__name__)

Tokens = tuple[int, int]  # number in the prompt, number in the reply


class EndpointError(Exception):
    """A server that cannot be used at all: no request will succeed."""


class RequestFailed(Exception):
    """A request has failed, after all its retries."""


class _Retry(Exception):
    """A try that failed. `after`: seconds that the server asks to wait. `unusable`: a reply came,
    but not in the form that was asked for."""

    def __init__(self, why: str, after: float = 0.0, unusable: bool = False) -> None:
        super().__init__(why)
        self.after, self.unusable = after, unusable


@dataclass
class Counts:
    """Counts of an Endpoint."""

    tries: int = 0  # requests sent
    failed: int = 0  # of these, requests without a usable reply


class Endpoint:
    """Sends requests. `wasted` is called with the kind and tokens of each unusable reply."""

    def __init__(self, config: EndpointConfig, wasted: Callable[[str, Tokens], None]) -> None:
        self.counts = Counts()
        self._config, self._wasted = config, wasted
        self._form = "schema" if config.json_form == "auto" else config.json_form
        self._resume = 0.0  # monotonic time before which the server wants no requests
        self._answered = False  # whether any reply has come
        self._lost = 0  # requests that failed in a row
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
        """Sends a request until it has a usable reply; returns that and its tokens.

        The reply is JSON of the request's schema, or a text. Raises RequestFailed after `retries`
        and EndpointError where no request can succeed.
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
                    self._wait_for(request.url, failed.after)
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

    def _wait_for(self, url: str, seconds: float) -> None:
        """No request is sent for what a server asks for, but no longer than `max_wait`."""
        now, most = time.monotonic(), self._config.max_wait
        if seconds > most and now >= self._resume:  # said once for all requests that wait
            logger.warning(
                "%s asks to wait for %.0f s: it is asked again after %.0f s (max_wait)",
                url, seconds, most,
            )  # fmt: skip
        self._resume = max(self._resume, now + min(seconds, most))

    @staticmethod
    async def _pause(seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)

    async def _once(self, request: Request, seed: int, room: int) -> tuple[Any, Tokens]:
        """One try; `room`: max_tokens. Raises _Retry where another try may succeed."""
        self.counts.tries += 1
        form = self._form
        url = f"{request.url.rstrip('/')}/chat/completions"
        try:
            async with self._session.post(url, json=_body(request, form, seed, room)) as answer:
                body = await answer.text(errors="replace")
        except aiohttp.ClientConnectorError as error:
            raise _Retry(f"no connection ({error})") from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _Retry(type(error).__name__) from None
        if answer.status != 200:
            after = _retry_after(answer.headers.get("Retry-After", ""))
            self._refused(request, form, answer.status, body[:300], after)
        self._answered = True
        tokens, text, cut = _parts(body, request)
        try:
            reply = text if request.schema is None else _json(text)
            request.check(reply)
        except ValueError as error:
            self._wasted(request.kind, tokens)
            why = "the reply was cut off" if cut else f"an unusable reply: {error}"
            raise _Retry(why, unusable=True) from None
        return reply, tokens

    def _refused(self, request: Request, form: str, status: int, text: str, after: float) -> None:
        """Raises the error that a status other than 200 stands for."""
        why = f"HTTP {status}: {text}"
        if status in _AGAIN or status >= 500:
            raise _Retry(why, after)
        if status in _FATAL:
            raise EndpointError(f"{request.url}, model {request.model}: {why}")
        auto = self._config.json_form == "auto" and request.schema is not None
        fallback = _FALLBACK.get(form) if auto else None
        if fallback and any(word in text for word in ("response_format", "json_schema",
                                                            "json_object", "guided")):  # fmt: skip
            self._form = fallback if self._form == form else self._form
            raise _Retry(why)
        raise RequestFailed(f"{request.kind}: {why}")


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


def _parts(body: str, request: Request) -> tuple[Tokens, str, bool]:
    """The tokens and text of a chat completion, and whether the text was cut off."""
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        text = choice["message"]["content"] or ""
        used = data.get("usage") or {}
        tokens = (int(used.get("prompt_tokens", request.tokens)),
                  int(used.get("completion_tokens", len(text) // 4)))  # fmt: skip
        return tokens, text, choice.get("finish_reason") == "length"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Retry(f"not a chat completion: {error!r:.100}", unusable=True) from None


def _json(text: str) -> Any:
    """The JSON object in a reply, which may stand between other words or fences. ValueError:
    there is none."""
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise ValueError(f"no JSON object in {text[:100]!r}")
    return json.loads(text[start : end + 1])


def _retry_after(value: str) -> float:
    """Seconds from now that a Retry-After header names, as a number or a date; 0 for neither."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
