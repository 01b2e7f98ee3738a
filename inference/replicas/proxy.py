"""Chat requests at the front: passed on to a replica, and to another one if that ends before its
answer has begun to go out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from functools import partial

import httpx
from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from inference.replicas.places import Places
from inference.replicas.replica import Replica
from inference.serve.accounts import Visit
from inference.serve.answers import UNBUFFERED, Stream
from inference.serve.chat import Client, ClientGone, read_body, refusal
from inference.serve.limits import Budget, Limits, Refused, Share
from inference.serve.wire import REQUESTED, USED_LINE, usage_of

_ROUTE = "/v1/chat/completions"
_FAILED = b'{"error":'
_LOST = "the replica that answered has ended: ask again"
_HEADERS = {"content-type": "application/json"}  # `read_body` takes nothing else
# Headers that go on: the rest is about one connection, or about the front's own name.
_ANSWERED = (
    "content-type",
    "retry-after",
    "x-moss-ignored",
    *(name.lower() for name in UNBUFFERED),
)


class Proxy:
    """Passes requests on."""

    def __init__(self, places: Places, limits: Limits) -> None:
        self._places, self._limits = places, limits
        self._budget = Budget(limits.held)

    @property
    def held(self) -> int:
        """Bytes of all requests that are passed on now."""
        return self._budget.held

    async def complete(self, request: Request, visit: Visit) -> Response:
        """Answers a request to the route; Refused where no replica does."""
        share, client = self._budget.share(), None
        try:
            body = await read_body(request, self._limits, share)
            client = Client(request)
            headers = _HEADERS | (visit.trace.headers if visit.trace is not None else {})
            return await client.unless_disconnected(self._pass_on(body, headers, share, visit))
        except (ClientGone, ClientDisconnect):
            share.give_back()
            return Response(status_code=499)
        except Refused as error:
            share.give_back()
            visit.code = error.code
            return refusal(error)
        except BaseException:
            share.give_back()
            raise
        finally:
            if client is not None:
                client.disconnected.cancel()

    async def _pass_on(
        self, body: bytes, headers: dict[str, str], share: Share, visit: Visit
    ) -> Response:
        tried: list[Replica] = []
        while True:
            replica = await self._replica(tried)
            tried.append(replica)
            replica.chats += 1
            streams, answer = False, None
            try:
                async with replica.answering():
                    answer = await self._begin(replica, body, headers)
                if answer.status_code == 503 and len(tried) == 1 and self._others(tried):
                    continue
                _note(visit, answer)
                kept = {name: answer.headers[name] for name in _ANSWERED if name in answer.headers}
                pieces = _counted(_pieces(answer, replica), visit)
                if kept.get("content-type", "").startswith("text/event-stream"):
                    first = await anext(pieces, b"")
                    streams = True
                    over = partial(self._over, answer, replica, share)
                    return Stream(_stream(first, pieces), kept.pop("content-type"), kept, over)
                content, status = b"".join([piece async for piece in pieces]), answer.status_code
                if answer.is_error or content.startswith(_FAILED):
                    with contextlib.suppress(ValueError, LookupError, TypeError):
                        visit.code = json.loads(content)["error"]["code"]
                    status = status if answer.is_error else 500  # it failed when it was begun
                share.give_back()
                return Response(content, status, kept)
            except httpx.TransportError:
                if len(tried) > 1:
                    raise Refused("replica_lost", _LOST) from None
            finally:
                if not streams:
                    await self._done(replica, answer)

    async def _begin(
        self, replica: Replica, body: bytes, headers: dict[str, str]
    ) -> httpx.Response:
        headers = {**headers, **replica.authorization}
        request = replica.http.build_request("POST", _ROUTE, content=body, headers=headers)
        return await replica.http.send(request, stream=True)

    async def _over(self, answer: httpx.Response, replica: Replica, share: Share) -> None:
        """Called when a stream has ended."""
        share.give_back()
        await self._done(replica, answer)

    async def _done(self, replica: Replica, answer: httpx.Response | None) -> None:
        """Ends a request to a replica, which computes no more of its answer."""
        replica.chats -= 1
        self._places.pump()
        if answer is not None:
            with contextlib.suppress(Exception):
                await answer.aclose()

    def _others(self, tried: list[Replica]) -> bool:
        return self._places.for_chat(tried) is not None

    async def _replica(self, tried: list[Replica]) -> Replica:
        """A replica that was not asked yet, if there is one; waits where none serves."""
        until = time.monotonic() + self._limits.wait
        while True:
            replica = self._places.for_chat(tried) or self._places.for_chat([])
            if replica is not None:
                return replica
            if time.monotonic() > until:
                raise Refused("overloaded", "no replica serves")
            await asyncio.sleep(0.05)


def _note(visit: Visit, answer: httpx.Response) -> None:
    """Takes over what the headers of a replica's answer say about the request."""
    if REQUESTED in answer.headers:
        visit.requested = json.loads(answer.headers[REQUESTED])
        visit.id = visit.requested.pop("id")


async def _pieces(answer: httpx.Response, replica: Replica) -> AsyncIterator[bytes]:
    """Yields an answer as it comes. httpx.TransportError where its replica ends, or is lost."""
    pieces = answer.aiter_raw()
    while True:
        async with replica.answering():
            piece = await anext(pieces, None)
        if piece is None:
            return
        yield piece


async def _stream(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yields the pieces of an answer as they come; an error is one of them, if the replica ends."""
    try:
        yield first
        async for piece in pieces:
            yield piece
    except httpx.TransportError:
        kind = {"type": "server_error", "param": None, "code": "replica_lost"}
        error = json.dumps({"error": {"message": _LOST, **kind}})
        yield f"\n\ndata: {error}\n\ndata: [DONE]\n\n".encode()


async def _counted(pieces: AsyncIterator[bytes], visit: Visit) -> AsyncIterator[bytes]:
    """Yields an answer without the lines that report its usage; that goes to the visit."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(USED_LINE):
                visit.report_usage(usage_of(line.removeprefix(USED_LINE)))
        kept = b"".join(line + b"\n" for line in lines if not line.startswith(USED_LINE))
        if kept:
            yield kept
    if rest:
        yield rest
