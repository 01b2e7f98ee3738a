"""`/v1/chat/completions`, as OpenAI's clients call it: offline questions about media."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import Tensor

from data_pipeline.images import decode_image
from data_pipeline.schema import SampleError
from data_pipeline.video import VideoInfo, open_video, sample_times
from inference.engine.engine import EngineFull
from inference.engine.images import check_header, check_video, fit
from inference.serve.hub import MODEL, Hub
from inference.serve.limits import Limits, Refused
from inference.serve.protocol import read_json
from inference.serve.question import Medium, Question, read_question
from inference.serve.stop import StopFilter
from inference.session.handle import SessionHandle
from inference.sources import CLIP_FPS, CLIP_MIN_FRAMES

_STATUS = {  # of a refusal's code; else 400
    "too_large": 413, "overloaded": 503, "unauthorized": 401, "failed": 500, "model_not_found": 404,
    "not_found": 404, "method_not_allowed": 405, "origin": 403,
}  # fmt: skip


async def complete(request: Request, hub: Hub) -> Response:
    """Answers a request to the route."""
    try:
        body = await _body(request, hub.limits)
        question, tokens, frames = await asyncio.get_running_loop().run_in_executor(
            hub.decoders, _read, body, hub
        )
        answer = await _start_answer(hub, question, tokens, frames)
    except Refused as error:
        hub.metrics.refused(error.code)
        return refusal(error)
    except SampleError as error:
        hub.metrics.refused(error.reason)
        return refusal(Refused(error.reason, error.detail, "messages"))
    if question.stream:
        pieces = _stream(question, answer, len(tokens))
        headers = _headers(question)
        return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)
    return await _whole(request, question, answer, len(tokens))


def refusal(error: Refused) -> JSONResponse:
    """An error as OpenAI's API writes it."""
    kinds = {503: "server_error", 500: "server_error", 401: "authentication_error"}
    code = _STATUS.get(error.code, 400)
    body = {
        "message": str(error),
        "type": kinds.get(code, "invalid_request_error"),
        "param": error.field,
        "code": error.code,
    }
    headers = {"Retry-After": "1"} if code == 503 else None
    return JSONResponse({"error": body}, code, headers)


async def _body(request: Request, limits: Limits) -> bytes:
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        field = "Content-Encoding"
        raise Refused("unsupported", f"{field}: {coding:.20}: send the body as it is", field)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limits.body_bytes:
            raise Refused("too_large", f"the request is larger than {limits.body_bytes} bytes")
    return bytes(body)


def _read(body: bytes, hub: Hub) -> tuple[Question, list[int], list[Tensor]]:
    """What is asked, its tokens and its frames; in a thread."""
    given = read_json(body, "the request")
    question = read_question(given, hub.limits)
    return question, *prepare(question, hub)


def prepare(question: Question, hub: Hub) -> tuple[list[int], list[Tensor]]:
    """Decodes the media and writes the tokens."""
    counts: list[int] = []
    frames: list[Tensor] = []
    for medium in question.media:
        left = hub.limits.frames - len(frames)
        if left <= 0:
            raise Refused("too_large", f"more than {hub.limits.frames} frames", "messages")
        try:
            new = _frames_of(medium, hub, left)
        except SampleError as error:
            words = f"{medium.field}: {error.reason}: {error.detail}"
            raise Refused(error.reason, words, medium.field) from None
        counts.append(len(new))
        frames += new
    prompt = hub.runner.vocabulary.prompts.question(
        question.messages, counts, hub.export.question_form, unfinished=question.unfinished
    )
    return prompt.tokens, frames


def _frames_of(medium: Medium, hub: Hub, left: int) -> list[Tensor]:
    """What a medium shows, at most `left` frames, uint8 [3, H, W] each; Refused, SampleError."""
    if medium.kind == "image":
        check_header(medium.data, hub.limits.pixels)
        return [fit(decode_image(medium.data), hub.runner.tile)]
    check_video(medium.data, hub.limits.pixels)
    with open_video(medium.data) as video:
        times = _times(medium, video.info, left, hub.limits.frames)
        return [fit(frame, hub.runner.tile) for frame in video.frames(times)]


def _times(medium: Medium, info: VideoInfo, left: int, limit: int) -> list[float]:
    """Which moments of a video are shown. What a request says of it is kept, or refused."""
    chosen = medium.frames
    # A rate that is asked for is kept, however few frames that are.
    few = 1 if chosen.fps else min(CLIP_MIN_FRAMES, left)
    most = chosen.num_frames or chosen.max_frames
    least = chosen.num_frames or chosen.min_frames or min(few, most or few)
    most = most or max(least, left + 1 if chosen.fps else left)
    times = sample_times(info, chosen.fps or CLIP_FPS, least, most)
    if len(times) > left:
        rate = f" at {chosen.fps:g} a second" if chosen.fps else ""
        words = f"{medium.field}: {info.duration - info.first:.1f} s{rate} are more than {left} "
        words += f"frames, what is left of {limit}: lower fps, or give max_frames"
        raise Refused("too_large", words, medium.field)
    return times


async def _start_answer(
    hub: Hub, question: Question, tokens: list[int], frames: list[Tensor]
) -> SessionHandle:
    """Waits for a free place in the engine; Refused(`overloaded`)."""
    if hub.waiting >= hub.limits.waiting:
        raise Refused("overloaded", "too many requests wait")
    hub.waiting += 1
    until = time.monotonic() + hub.limits.wait
    try:
        while not hub.closing:
            try:
                return hub.runner.answer(
                    tokens,
                    frames,
                    sampling=question.sampling,
                    max_new_tokens=question.max_tokens,
                    ignore_end=question.ignore_end,
                )
            except EngineFull:
                if time.monotonic() > until:
                    break
                await asyncio.sleep(0.02)
        raise Refused("overloaded", "all sessions are taken")
    finally:
        hub.waiting -= 1


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


async def _whole(
    request: Request, question: Question, answer: SessionHandle, asked: int
) -> Response:
    said, end, count = [], "stop", 0
    try:
        async for piece, reason, tokens in _pieces(question, answer):
            said.append(piece)
            end, count = reason or end, tokens
            if await request.is_disconnected():
                answer.close("its client has left")
    except Refused as error:
        return refusal(error)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(said)},
        "logprobs": None,
        "finish_reason": end,
    }
    head = _head(question, "chat.completion")
    body = {**head, "choices": [choice], "usage": _usage(asked, count)}
    return JSONResponse(body, headers=_headers(question))


async def _stream(question: Question, answer: SessionHandle, asked: int) -> AsyncIterator[str]:
    head = _head(question, "chat.completion.chunk")

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _sse({**head, "choices": [choice]})

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
        yield _sse({"error": {"message": str(error), "type": "server_error", "code": error.code}})
    if question.usage:
        yield _sse({**head, "choices": [], "usage": _usage(asked, count)})
    yield "data: [DONE]\n\n"


def _headers(question: Question) -> dict[str, str]:
    """Names what was given and the model does not see."""
    return {"X-Moss-Ignored": ", ".join(question.ignored)} if question.ignored else {}


def _head(question: Question, kind: str) -> dict[str, Any]:
    return {"id": question.name, "object": kind, "created": question.created, "model": MODEL}


def _usage(asked: int, said: int) -> dict[str, int]:
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
