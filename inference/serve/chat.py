"""`/v1/chat/completions`, as OpenAI's clients call it: offline questions about media."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from torch import Tensor

from data_pipeline.images import decode_image
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, Message, SampleError
from inference.engine.engine import EngineFull
from inference.engine.images import check_header, check_video, fit
from inference.engine.sampling import Sampling
from inference.serve.hub import MODEL, Hub
from inference.serve.limits import SAMPLING_RANGES, Limits, Refused
from inference.serve.protocol import data_url, read_number
from inference.session.answer import MAX_NEW_TOKENS
from inference.session.handle import SessionHandle
from inference.sources import CLIP_FPS, CLIP_MIN_FRAMES, clip_frames

# Fields that are not supported, each with the values that do not ask for anything.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "functions": ([],),
    "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "response_format": ({"type": "text"},), "audio": (), "modalities": (["text"],),
}  # fmt: skip


@dataclass
class Question:
    """A checked request. `media`: (kind, bytes) for each mark of the messages, in order."""

    messages: list[Message]
    media: list[tuple[str, bytes]]
    sampling: Sampling
    max_tokens: int
    stop: list[str]
    stream: bool
    usage: bool  # a stream ends with a piece that has the counts
    name: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


async def complete(request: Request, hub: Hub) -> Response:
    """Answers a request to the route."""
    try:
        question = read_question(await _body(request, hub.limits), hub.limits)
        tokens, frames = await asyncio.get_running_loop().run_in_executor(
            hub.decoders, prepare, question, hub
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
        return StreamingResponse(pieces, media_type="text/event-stream")
    return await _whole(request, question, answer, len(tokens))


def refusal(error: Refused) -> JSONResponse:
    """An error as OpenAI's API writes it."""
    status = {"too_large": 413, "overloaded": 503, "unauthorized": 401, "failed": 500}
    kinds = {503: "server_error", 500: "server_error", 401: "authentication_error"}
    code = status.get(error.code, 400)
    body = {
        "message": str(error),
        "type": kinds.get(code, "invalid_request_error"),
        "param": error.field,
        "code": error.code,
    }
    headers = {"Retry-After": "1"} if code == 503 else None
    return JSONResponse({"error": body}, code, headers)


async def _body(request: Request, limits: Limits) -> Any:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limits.body_bytes:
            raise Refused("too_large", f"the request is larger than {limits.body_bytes} bytes")
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", f"the request is not JSON: {error}") from None


def read_question(body: Any, limits: Limits) -> Question:
    """Checks a request; Refused names the field."""
    if not isinstance(body, dict):
        raise Refused("invalid_value", "the request must be an object")
    for name, harmless in _NOT_DONE.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise Refused("unsupported", f"{name}: {body[name]!r:.60} is not supported", name)
    turns = body.get("messages")
    if not isinstance(turns, list) or not turns:
        raise Refused("invalid_value", "messages: expected a list of messages", "messages")
    messages: list[Message] = []
    media: list[tuple[str, bytes]] = []
    for number, turn in enumerate(turns):
        messages.append(_message(turn, f"messages[{number}]", media, limits))
    if messages[-1].role != "user":
        raise Refused("invalid_value", "messages: the last one must be the user's", "messages")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise Refused("invalid_value", "stop: expected texts", "stop")
    most = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    max_tokens = _number(body, most, 1, limits.max_tokens, min(MAX_NEW_TOKENS, limits.max_tokens))
    options = body.get("stream_options") or {}
    usage = bool(isinstance(options, dict) and options.get("include_usage"))
    return Question(
        messages, media, _sampling(body), int(max_tokens), stop, bool(body.get("stream")), usage
    )


def _message(turn: Any, field: str, media: list[tuple[str, bytes]], limits: Limits) -> Message:
    role: Any = turn.get("role") if isinstance(turn, dict) else None
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise Refused("invalid_value", f"{field}.role: system, user or assistant", f"{field}.role")
    content = turn.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Refused("invalid_value", f"{field}.content: a text or a list of parts", field)
    text = ""
    for number, part in enumerate(parts):
        name = f"{field}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if IMAGE_MARK in part["text"] or VIDEO_MARK in part["text"]:
                raise Refused("control_token", f"{name}: media come as parts, not as marks", name)
            text += part["text"]
        elif kind in ("image_url", "video_url"):
            what = kind.removesuffix("_url")
            url = part[kind].get("url") if isinstance(part.get(kind), dict) else part.get(kind)
            most = limits.frame_bytes if what == "image" else limits.body_bytes
            media.append((what, data_url(url, f"{name}.{kind}", f"{what}/", most)))
            text += IMAGE_MARK if what == "image" else VIDEO_MARK
        else:
            raise Refused("invalid_value", f"{name}.type: text, image_url or video_url", name)
    if len(text) > limits.prompt_chars:
        raise Refused("too_large", f"{field}: more than {limits.prompt_chars} characters", field)
    return Message(role, text)


def _sampling(body: dict[str, Any]) -> Sampling:
    given: dict[str, Any] = {}
    for name, default in asdict(Sampling()).items():
        if name not in ("seed", "silence_bias"):  # of another range, and not OpenAI's
            given[name] = type(default)(_number(body, name, *SAMPLING_RANGES[name], default))
    seed = int(_number(body, "seed", -(2**63), 2**63 - 1, Sampling.seed)) % 2**53
    return Sampling(**given, seed=seed)


def _number(body: dict[str, Any], name: str, least: float, largest: float, default: float) -> Any:
    value = body.get(name)
    return default if value is None else read_number(value, name, least, largest, whole=False)


def prepare(question: Question, hub: Hub) -> tuple[list[int], list[Tensor]]:
    """Decodes the media and writes the tokens; in a thread."""
    counts: list[int] = []
    frames: list[Tensor] = []
    for kind, data in question.media:
        left = hub.limits.frames - len(frames)
        if left <= 0:
            raise Refused("too_large", f"more than {hub.limits.frames} frames", "messages")
        if kind == "image":
            check_header(data, hub.limits.pixels)
            new = [fit(decode_image(data), hub.runner.tile)]
        else:
            check_video(data, hub.limits.pixels)
            new = clip_frames(data, CLIP_FPS, min(CLIP_MIN_FRAMES, left), left)
        counts.append(len(new))
        frames += new
    form = hub.export.question_form
    prompt = hub.runner.vocabulary.prompts.question(question.messages, counts, form)
    return prompt.tokens, frames


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
                    tokens, frames, sampling=question.sampling, max_new_tokens=question.max_tokens
                )
            except EngineFull:
                if time.monotonic() > until:
                    break
                await asyncio.sleep(0.02)
        raise Refused("overloaded", "all sessions are taken")
    finally:
        hub.waiting -= 1


class _StopFilter:
    """Text of an answer up to the first stop text. Holds back what may be the start of one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops, self._held, self.stopped = stops, "", False

    def append(self, piece: str) -> str:
        self._held += piece
        stops = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if stops:
            self.stopped, self._held = True, self._held[: min(stops)]
            return self.flush()
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _overlap(self, stop: str) -> int:
        """How many of the last characters may be the first ones of `stop`."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((n for n in sizes if stop.startswith(self._held[-n:])), 0)


async def _pieces(question: Question, answer: SessionHandle) -> AsyncIterator[tuple[str, str, int]]:
    """(text, reason of the end or "", tokens so far); Refused if the engine failed."""
    text, count = _StopFilter(question.stop), 0
    try:
        async for event in answer.events():
            if event.type == "response.output_text.delta":
                piece = text.append(event.data["delta"])
                if text.stopped:
                    yield piece, "stop", answer.stats()["tokens"]
                    return
                yield piece, "", count
            elif event.type == "response.done":
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
    said, end, count = "", "stop", 0
    try:
        async for piece, reason, tokens in _pieces(question, answer):
            said, end, count = said + piece, reason or end, tokens
            if await request.is_disconnected():
                answer.close("its client has left")
    except Refused as error:
        return refusal(error)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said},
        "logprobs": None,
        "finish_reason": end,
    }
    head = _head(question, "chat.completion")
    return JSONResponse({**head, "choices": [choice], "usage": _usage(asked, count)})


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


def _head(question: Question, kind: str) -> dict[str, Any]:
    return {"id": question.name, "object": kind, "created": question.created, "model": MODEL}


def _usage(asked: int, said: int) -> dict[str, int]:
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
