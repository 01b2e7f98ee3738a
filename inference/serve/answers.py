"""Answers of `/v1/chat/completions`, whole or in pieces, as OpenAI's API writes them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from inference.serve.hub import MODEL
from inference.serve.limits import Refused
from inference.serve.question import Question
from inference.serve.stop import StopFilter
from inference.session.handle import SessionHandle


async def _pieces(question: Question, answer: SessionHandle) -> AsyncIterator[tuple[str, str, int]]:
    """(text, reason of the end or "", tokens so far); Refused if the engine failed."""
    text, count = StopFilter(question.stop, keep=question.stop_in_answer), 0
    try:
        async for event in answer.events():
            if event.type == "response.output_text.delta":
                piece = text.append(event.data["delta"])
                if text.stopped:
                    yield piece, "stop", answer.stats()["tokens"]
                    return
                yield piece, "", count
            elif event.type == "response.done" and event.data["status"] != "cancelled":
                count = event.data["usage"]["output_tokens"]
                cut = event.data["reason"] == "max_new_tokens"
                yield text.flush(), "length" if cut else "stop", count
                return
            elif event.type in ("error", "session.closed"):
                words = event.data.get("message") or event.data.get("reason", "")
                raise Refused("failed", f"the answer failed: {words}")
    finally:
        answer.close("its request is over")


async def whole(question: Question, answer: SessionHandle, asked: int) -> dict[str, Any]:
    """`asked`: tokens of the prompt. Refused if the engine failed."""
    said, end, count = [], "stop", 0
    async for piece, reason, tokens in _pieces(question, answer):
        said.append(piece)
        end, count = reason or end, tokens
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(said), "refusal": None},
        "logprobs": None,
        "finish_reason": end,
    }
    head = _head(question, "chat.completion")
    return {**head, "choices": [choice], "usage": _usage(asked, count)}


class Stream(StreamingResponse):
    """An answer in pieces; `over` is called when it has ended, however it does."""

    def __init__(
        self, question: Question, answer: SessionHandle, asked: int, over: Callable[[], None]
    ) -> None:
        pieces = _stream(question, answer, asked)
        super().__init__(pieces, headers=question.headers(), media_type="text/event-stream")
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


async def _stream(question: Question, answer: SessionHandle, asked: int) -> AsyncIterator[str]:
    head = _head(question, "chat.completion.chunk")

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        counts = {"usage": None} if question.usage else {}
        return _sse({**head, "choices": [choice], **counts})

    yield chunk({"role": "assistant", "content": ""})
    count = 0
    try:
        async for piece, reason, tokens in _pieces(question, answer):
            if piece:
                yield chunk({"content": piece})
            if reason:
                count = tokens
                yield chunk({}, reason)
    except Refused as error:
        said = {"message": str(error), "type": "server_error", "param": None, "code": error.code}
        yield _sse({"error": said})
    if question.usage:
        yield _sse({**head, "choices": [], "usage": _usage(asked, count)})
    yield "data: [DONE]\n\n"


def _head(question: Question, kind: str) -> dict[str, Any]:
    return {"id": question.name, "object": kind, "created": question.created, "model": MODEL}


def _usage(asked: int, said: int) -> dict[str, int]:
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
