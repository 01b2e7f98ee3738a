"""Writes answers of `/v1/chat/completions`, whole or streamed, as OpenAI's API has them."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from inference.serve.accounts import Usage
from inference.serve.hub import MODEL
from inference.serve.limits import Refused
from inference.serve.question import Question
from inference.serve.stop import StopFilter
from inference.serve.tools import Call, CallReader, Tools
from inference.serve.wire import USED_LINE, usage_text
from inference.session.detokenize import special_tokens, token_bytes
from inference.session.handle import SessionHandle

QUIET = 10.0  # seconds after which a stream says that it goes on: proxies end those that are idle

COMMENT = ":\n\n"  # of a stream, which clients skip

# Of a stream: proxies give each of its pieces on when it comes.
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass
class _Piece:
    """text: may be empty. reason: of the end; empty: it goes on. tokens: of the answer so far.
    calls: of tools, that come after the text."""

    text: str
    logprobs: list[Any]
    reason: str = ""
    tokens: int = 0
    calls: list[Call] = field(default_factory=list)


class _Likelihoods:
    """Holds log-probabilities of tokens until the text that they belong to is given out."""

    def __init__(self) -> None:
        self._waiting = deque[tuple[int, Any]]()  # where the text begins that they came with
        self._appended = self._released = 0  # characters

    def append(self, text: str, entries: Sequence[Any]) -> None:
        self._waiting.extend((self._appended, entry) for entry in entries)
        self._appended += len(text)

    def give(self, text: str, *, all: bool = False) -> list[Any]:
        """The log-probabilities of a text that is given out; with `all`, also those that are
        left."""
        self._released += len(text)
        entries = []
        while self._waiting and (all or self._waiting[0][0] < self._released):
            entries.append(self._waiting.popleft()[1])
        return entries


async def _pieces(question: Question, answer: SessionHandle) -> AsyncGenerator[_Piece]:
    """Yields the pieces of one answer. Raises Refused if the engine failed."""
    text, likely = StopFilter(question.stop, keep=question.stop_in_answer), _Likelihoods()
    least = question.end.least
    try:
        async for event in answer.events():
            if event.type == "response.output_text.delta":
                likely.append(event.data["delta"], event.data.get("logprobs", ()))
                ends = not least or event.data["tokens"] > least
                piece = text.append(event.data["delta"], ends=ends)
                end = "stop" if text.stopped else ""
                count = answer.stats()["tokens"] if end else 0
                yield _Piece(piece, likely.give(piece), end, count)
                if end:
                    return
            elif event.type == "response.done" and event.data["status"] != "cancelled":
                cut, rest = event.data["reason"] == "max_new_tokens", text.flush()
                count, end = event.data["usage"]["output_tokens"], "length" if cut else "stop"
                yield _Piece(rest, likely.give(rest, all=True), end, count)
                return
            elif event.type in ("error", "session.closed"):
                words = event.data.get("message") or event.data.get("reason", "")
                if event.data.get("code") == "grammar":  # the request's own
                    name = question.schema_field
                    raise Refused("invalid_value", f"{name}: {words}", name)
                raise Refused("failed", f"the answer failed: {words}")
    finally:
        answer.close("its request is over")


async def _with_calls(
    pieces: AsyncGenerator[_Piece], tools: Tools, answer: SessionHandle
) -> AsyncIterator[_Piece]:
    """Yields the pieces of an answer, in which calls of tools are told from its text."""
    reader, called = CallReader(list(tools.schemas)), False
    async with aclosing(pieces):
        async for piece in pieces:
            found = reader.append(piece.text)
            if piece.reason:
                found.append(reader.flush(cut=piece.reason == "length"))
            calls = [one for one in found if isinstance(one, Call)]
            if calls and not tools.several:  # it ends with the first
                calls = calls[:1]
                found = found[: found.index(calls[0])]
                piece.reason, piece.tokens = "stop", answer.stats()["tokens"]
            called = called or bool(calls)
            text = "".join(one for one in found if isinstance(one, str))
            reason = "tool_calls" if called and piece.reason == "stop" else piece.reason
            yield replace(piece, text=text, calls=calls, reason=reason)
            if reason:
                return


def close(answers: Sequence[SessionHandle], reason: str) -> None:
    for answer in answers:
        answer.close(reason)


class Writer:
    """Writes the answers to a question.

    Args:
        prompt_tokens: how many tokens the prompt has.
    """

    def __init__(
        self,
        question: Question,
        answers: Sequence[SessionHandle],
        prompt_tokens: int,
        tokenizer: Tokenizer,
    ) -> None:
        self.question, self._answers, self._prompt_tokens = question, answers, prompt_tokens
        self._tokenizer, self._special = tokenizer, special_tokens(tokenizer)
        self._counts = [0] * len(answers)  # tokens of each

    async def whole(self) -> dict[str, Any]:
        """The body of a whole response. Raises Refused if the engine failed."""
        texts, likely = [""] * len(self._answers), [list[Any]() for _ in self._answers]
        ends, calls = ["stop"] * len(self._answers), [list[Call]() for _ in self._answers]
        async for one in self._merged():
            if one is None:
                continue
            number, piece = one
            texts[number] += piece.text
            likely[number] += piece.logprobs
            calls[number] += piece.calls
            ends[number] = piece.reason or ends[number]
        choices = [
            {
                "index": number,
                "message": _message(text, calls[number]),
                "logprobs": self._logprobs(likely[number]),
                "finish_reason": ends[number],
            }
            for number, text in enumerate(texts)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Yields the events of a streamed response; the last one is `[DONE]`."""
        called = [0] * len(self._answers)
        for number in range(len(self._answers)):
            yield self._chunk(number, {"role": "assistant", "content": ""})
        try:
            async for one in self._merged():
                if one is None:
                    yield COMMENT
                    continue
                number, piece = one
                if piece.text or piece.logprobs:
                    yield self._chunk(number, {"content": piece.text}, piece.logprobs)
                for call in piece.calls:
                    entry = {"index": called[number], **call.as_dict()}
                    called[number] += 1
                    yield self._chunk(number, {"tool_calls": [entry]})
                if piece.reason:
                    yield self._chunk(number, {}, reason=piece.reason)
        except Refused as error:
            body = {"message": str(error), "type": "server_error", "param": None}
            yield _sse({"error": {**body, "code": error.code}})
        if self.question.usage:
            head = self._head("chat.completion.chunk")
            yield _sse({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _merged(self) -> AsyncIterator[tuple[int, _Piece] | None]:
        """Yields (number of the answer, piece) of all answers as they come; None where nothing has
        come for a while. Where one fails, all end."""
        queue = asyncio.Queue[tuple[int, _Piece] | Exception]()
        tasks = [
            asyncio.create_task(self._read(number, answer, queue))
            for number, answer in enumerate(self._answers)
        ]
        open_ones = len(tasks)
        try:
            while open_ones:
                try:
                    one = await asyncio.wait_for(queue.get(), QUIET)
                except TimeoutError:
                    yield None
                    continue
                if isinstance(one, Exception):
                    raise one
                number, piece = one
                if piece.reason:
                    open_ones, self._counts[number] = open_ones - 1, piece.tokens
                elif self.question.usage_so_far:
                    self._counts[number] = self._answers[number].stats()["tokens"]
                yield number, piece
        finally:
            for task in tasks:
                task.cancel()
            close(self._answers, "its request is over")

    async def _read(
        self,
        number: int,
        answer: SessionHandle,
        queue: asyncio.Queue[tuple[int, _Piece] | Exception],
    ) -> None:
        tools, pieces = self.question.tools, _pieces(self.question, answer)
        try:
            async for piece in _with_calls(pieces, tools, answer) if tools else pieces:
                queue.put_nowait((number, piece))
        except Exception as error:
            queue.put_nowait(error)

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        logprobs: Sequence[Any] = (),
        reason: str | None = None,
    ) -> str:
        likely = self._logprobs(logprobs) if logprobs else None
        choice = {"index": number, "delta": delta, "logprobs": likely, "finish_reason": reason}
        counts: dict[str, Any] = {"usage": None} if self.question.usage else {}
        if self.question.usage_so_far:
            counts = {"usage": self._usage()}
        return _sse({**self._head("chat.completion.chunk"), "choices": [choice], **counts})

    def _logprobs(self, entries: Sequence[Any]) -> dict[str, Any] | None:
        if self.question.likely is None:
            return None
        content = [
            {
                **self._likelihood(token, own),
                "top_logprobs": [self._likelihood(*one) for one in top],
            }
            for token, own, top in entries
        ]
        return {"content": content, "refusal": None}

    def _likelihood(self, token: int, logprob: float) -> dict[str, Any]:
        written = token_bytes(self._tokenizer, token)
        text_bytes = [] if token in self._special else list(written)  # what the text has of it
        return {
            "token": written.decode("utf-8", "replace"),
            "logprob": logprob,
            "bytes": text_bytes,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        name, created = self.question.name, self.question.created
        return {"id": name, "object": kind, "created": created, "model": MODEL}

    def _usage(self) -> dict[str, int]:
        completion = sum(self._counts)
        total = self._prompt_tokens + completion
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": total,
        }


def _message(text: str, calls: Sequence[Call]) -> dict[str, Any]:
    content = None if calls and not text else text
    message = {"role": "assistant", "content": content, "refusal": None}
    return {**message, "tool_calls": [call.as_dict() for call in calls]} if calls else message


class Stream(StreamingResponse):
    """A streamed response. `over` is awaited at its end, however it ends: also where the client has
    left before the first piece."""

    def __init__(
        self,
        pieces: AsyncIterator[str | bytes],
        kind: str,
        headers: Mapping[str, str],
        over: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(pieces, headers=headers, media_type=kind)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._over()


async def with_usage(
    pieces: AsyncIterator[str | bytes], used: Callable[[], Usage]
) -> AsyncIterator[str | bytes]:
    """Yields before each piece a line with the usage so far."""
    async for piece in pieces:
        yield f"{USED_LINE.decode()}{usage_text(used())}\n"
        yield piece


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
