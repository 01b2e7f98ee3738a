"""`/v1/chat/completions`, as OpenAI's clients call it: offline questions about media.

A request on its way: body -> question (a thread) -> frames (processes) -> tokens -> a free place in
the engine -> answer (answers.py). Its client may leave at any of these.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from torch import Tensor

from data_pipeline.schema import SampleError
from inference.engine.engine import EngineFull
from inference.serve.accounts import Usage, Visit
from inference.serve.answers import UNBUFFERED, Stream, Writer, close, with_usage
from inference.serve.decoding import Task
from inference.serve.hub import Hub
from inference.serve.limits import Limits, Refused, Share
from inference.serve.protocol import read_json
from inference.serve.question import Medium, Question, check_tokens, read_question
from inference.serve.wire import REQUESTED
from inference.session.answer import MAX_NEW_TOKENS
from inference.session.grammar import Grammar, GrammarError
from inference.session.handle import SessionClosed, SessionHandle

_STATUS = {  # of a refusal's code; else 400
    "too_large": 413, "overloaded": 503, "unauthorized": 401, "failed": 500, "model_not_found": 404,
    "not_found": 404, "method_not_allowed": 405, "origin": 403, "host": 403, "timeout": 408,
    "unsupported_media_type": 415, "upgrade_required": 426, "replica_lost": 503,
    "rate_limit_exceeded": 429,
}  # fmt: skip
_USAGE_EVERY = 0.2  # seconds between two reports to a front of what a whole answer has used
_HELD = 4  # a request's text, its JSON and its pictures' bytes are there at the same time
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client of a request has gone."""


class Client:
    """Watches whether the client that has sent a request is still connected."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.disconnected = asyncio.create_task(self._watch())

    async def unless_disconnected(self, work: Coroutine[None, None, Result]) -> Result:
        """The result of the work; when the client goes, cancels it and raises ClientGone."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self.disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            return task.result()
        finally:
            task.cancel()

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


async def complete(request: Request, hub: Hub, visit: Visit) -> Response:
    """Answers a request to the route."""
    share = hub.budget.share()
    client = None
    try:
        body = await read_body(request, hub.limits, share)
        client = Client(request)
        began = visit.now
        prepared = await client.unless_disconnected(_prepare(body, hub, share))
        question, tokens = prepared.question, prepared.tokens
        visit.id, visit.requested = question.name, prepared.described()
        began = visit.stage("decode", began)
        answers = await client.unless_disconnected(_start_answers(hub, prepared))
        began = visit.stage("queue", began)
        for answer in answers:
            visit.follow(answer.log, began)
        visit.reads = partial(_used, answers, len(prepared.frames))
        client.disconnected.add_done_callback(lambda _: close(answers, "its client has left"))
    except (Refused, SampleError) as error:
        _end(client, share)
        return _refused(hub, error, visit)
    except BaseException as error:
        _end(client, share)
        if not isinstance(error, ClientGone | ClientDisconnect):
            raise
        hub.metrics.refused("client_left")
        return Response(status_code=499)
    written = Writer(question, answers, len(tokens), hub.runner.vocabulary.tokenizer)
    headers = question.headers()
    if not (question.stream or visit.account.front):
        try:
            return JSONResponse(await _whole(written, client), headers=headers)
        except Refused as error:
            return _refused(hub, error, visit)
        except ClientGone:
            hub.metrics.refused("client_left")
            return Response(status_code=499)
        finally:
            _end(client, share)
    headers |= UNBUFFERED if question.stream else {}
    pieces = written.stream() if question.stream else _waiting(written, client, hub, visit)
    if visit.account.front:
        headers |= {REQUESTED: json.dumps({"id": visit.id, **visit.requested})}
        pieces = with_usage(pieces, visit.reads)
    kind = "text/event-stream" if question.stream else "application/json"

    async def over() -> None:
        _end(client, share)

    return Stream(pieces, kind, headers, over)


async def _whole(written: Writer, client: Client) -> dict[str, Any]:
    """The body of a whole answer. Raises ClientGone where it failed because its client has gone."""
    try:
        return await written.whole()
    except Refused:
        if client.disconnected.done():
            raise ClientGone from None
        raise


async def _waiting(
    written: Writer, client: Client, hub: Hub, visit: Visit
) -> AsyncIterator[str | bytes]:
    """The body of a whole answer, after empty pieces that come while it is made."""
    task = asyncio.create_task(_whole(written, client))
    try:
        while not task.done():
            yield b""
            await asyncio.wait({task}, timeout=_USAGE_EVERY)
        try:
            yield bytes(JSONResponse(task.result()).body)
        except Refused as error:  # its status has gone out: the front sees what it is
            yield bytes(_refused(hub, error, visit).body)
        except ClientGone:
            return
    finally:
        task.cancel()


def _end(client: Client | None, share: Share) -> None:
    """Frees all that a request holds."""
    share.give_back()
    if client is not None:
        client.disconnected.cancel()


def _used(answers: Sequence[SessionHandle], frames: int) -> Usage:
    """The usage of a request, in which the prompt counts once, however many answers there are."""
    counts = [answer.running.task.stats.counts for answer in answers]
    output_tokens = sum(one["tokens"] for one in counts)
    return Usage(frames, max(one["input_tokens"] for one in counts), output_tokens)


def _refused(hub: Hub, error: Refused | SampleError, visit: Visit) -> Response:
    if isinstance(error, SampleError):
        error = Refused(error.reason, error.detail, "messages")
    visit.code = error.code
    hub.metrics.refused(error.code)
    return refusal(error)


def refusal(error: Refused) -> JSONResponse:
    """An error as OpenAI's API writes it."""
    kinds = {
        401: "authentication_error", 429: "rate_limit_error", 500: "server_error",
        503: "server_error",
    }  # fmt: skip
    code = _STATUS.get(error.code, 400)
    body = {
        "message": str(error),
        "type": kinds.get(code, "invalid_request_error"),
        "param": error.field,
        "code": error.code,
    }
    retry = 1.0 if code == 503 and error.retry is None else error.retry
    headers = None if retry is None else {"Retry-After": str(max(1, math.ceil(retry)))}
    return JSONResponse({"error": body}, code, headers)


async def read_body(request: Request, limits: Limits, share: Share) -> bytes:
    """A request's body; Refused where it is too large, too slow, or not JSON by its type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site may send anything else unasked
        field = "Content-Type"
        words = f"{field}: {kind!r:.60}: must be application/json"
        raise Refused("unsupported_media_type", words, field)
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        field = "Content-Encoding"
        raise Refused("unsupported", f"{field}: {coding:.20}: send the body as it is", field)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_wall):
            async for piece in request.stream():
                if len(body) + len(piece) > limits.body_bytes:
                    most = limits.body_bytes
                    raise Refused("too_large", f"the request is larger than {most} bytes")
                share.take(_HELD * len(piece))
                body += piece
    except TimeoutError:
        words = f"the request has not come within {limits.body_wall:g} s"
        raise Refused("timeout", words) from None
    return bytes(body)


@dataclass(frozen=True)
class _PreparedRequest:
    question: Question
    tokens: list[int]  # of the prompt
    frames: list[Tensor]  # uint8 [3, tile, tile] each
    grammar: Grammar | None

    def described(self) -> dict[str, Any]:
        """The request without its contents, for logs."""
        question = self.question
        return {
            "messages": len(question.messages), "frames": len(self.frames), "n": question.count,
            "max_tokens": question.max_tokens, "stream": question.stream,
        }  # fmt: skip


async def _prepare(body: bytes, hub: Hub, share: Share) -> _PreparedRequest:
    loop = asyncio.get_running_loop()
    question = await loop.run_in_executor(hub.readers, _read, body, hub)
    frames, counts = await decode(question.media, hub, share)
    tokens = await loop.run_in_executor(hub.readers, _tokens, question, counts, hub)
    grammar = None
    if question.schema is not None:
        grammar = await loop.run_in_executor(hub.schemas, _grammar, question, hub)
    return _PreparedRequest(question, tokens, frames, grammar)


def _read(body: bytes, hub: Hub) -> Question:
    request = read_json(body, "the request", hub.limits.json_values)
    question = read_question(request, hub.limits, hub.folders)
    places = hub.runner.engine.max_sessions
    if question.count > places:
        words = f"n: {question.count}: this server has {places} places (--max_sessions)"
        raise Refused("invalid_value", words, "n")
    check_tokens(question, hub.runner.engine.config.text_config.vocab_size)
    return question


def _grammar(question: Question, hub: Hub) -> Grammar:
    try:
        return hub.grammars.of_schema(question.schema or {})
    except GrammarError as error:
        field, tools = question.schema_field, question.tools
        which = "the schema" if tools is None or tools.needed else "its schema, or one of tools,"
        words = f"{field}: {which} is not supported: {error}"
        raise Refused("invalid_value", words, field) from None


async def decode(media: list[Medium], hub: Hub, share: Share) -> tuple[list[Tensor], list[int]]:
    """Decodes a question's media: frames, uint8 [3, tile, tile] each, and their number for each
    medium."""
    limits, frames, counts = hub.limits, list[Tensor](), list[int]()
    most = min(limits.frames, hub.runner.engine.window)  # the model sees no more at once
    for medium in media:
        left = most - len(frames)
        if left <= 0:
            raise Refused("too_large", f"more than {most} frames", "messages")
        task = Task(
            medium.kind, medium.source, medium.where, hub.runner.tile, limits.body_bytes,
            limits.pixels, limits.clip_cpu, left, most, medium.frames,
        )  # fmt: skip
        try:
            new = await hub.clips.frames(task, share.take)
        except SampleError as error:
            words = f"{medium.where}: {error.reason}: {error.detail}"
            raise Refused(error.reason, words, medium.where) from None
        except Refused as error:
            if error.field is None and error.code != "overloaded":
                error = Refused(error.code, f"{medium.where}: {error}", medium.where)
            raise error from None
        frames += new
        counts.append(len(new))
    return frames, counts


def _tokens(question: Question, counts: list[int], hub: Hub) -> list[int]:
    """The tokens of the prompt. Raises Refused(`context_length_exceeded`)."""
    prompts = hub.runner.vocabulary.prompts
    form = hub.export.question_form
    tokens = prompts.question(
        question.messages, counts, form, unfinished=question.unfinished
    ).tokens
    most = hub.runner.engine.max_tokens
    limit, least = question.max_tokens, question.end.least
    if len(tokens) + (limit or least or 1) > most:
        words = f"the model's context is {most} tokens: the messages have {len(tokens)}"
        name = "max_tokens" if limit else "min_tokens"
        words += f", and {name} asks for {limit or least}" if limit or least else ""
        raise Refused("context_length_exceeded", f"messages: {words}", "messages")
    usual = max(least, min(MAX_NEW_TOKENS, hub.limits.max_tokens))
    question.max_tokens = limit or min(usual, most - len(tokens))
    return tokens


async def _start_answers(hub: Hub, prepared: _PreparedRequest) -> list[SessionHandle]:
    """Waits for free places in the engine, and memory, for all answers at once; starts them. Raises
    Refused(`overloaded`)."""
    question, each, full = prepared.question, hub.each.kept, "all sessions are taken"
    size = each * question.count
    if hub.limits.sessions_memory and size > hub.limits.sessions_memory:
        raise Refused("too_large", f"{question.count} answers: {hub.memory.lacks(size)}")
    if hub.waiting >= hub.limits.waiting:
        raise Refused("overloaded", "too many requests wait")
    hub.waiting += 1
    until = time.monotonic() + hub.limits.wait
    try:
        while not hub.closing:
            try:
                hub.memory.check(size)
                answers = hub.runner.answers(
                    prepared.tokens,
                    prepared.frames,
                    question.samplings,
                    max_new_tokens=question.max_tokens or MAX_NEW_TOKENS,
                    ignore_end=question.ignore_end,
                    end=question.end,
                    grammar=prepared.grammar,
                    likely=question.likely,
                )
                for answer in answers:
                    hub.hold(answer.log, each)
                return answers
            except EngineFull as error:
                full = str(error)
                if time.monotonic() > until:
                    break
            if not await hub.make_room(size):
                await asyncio.sleep(0.02)
        raise Refused("overloaded", full)
    except SessionClosed as error:  # the engine ends, or has failed
        raise Refused("overloaded", str(error)) from None
    finally:
        hub.waiting -= 1
