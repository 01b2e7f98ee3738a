"""A request for `/v1/chat/completions`, read and checked: messages, media, how to answer."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from data_pipeline.prompts import as_system, as_typed
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, Message
from data_pipeline.tool_texts import with_calls
from inference.engine.sampling import SEEDS, Sampling
from inference.serve.decoding import FrameChoice
from inference.serve.limits import Limits, Refused
from inference.serve.media_files import NO_FOLDERS, MediaFolders
from inference.serve.protocol import check_model
from inference.serve.requests import (
    Answer,
    ChatRequest,
    ImagePart,
    RefusalPart,
    ResponseFormat,
    TextPart,
    VideoPart,
)
from inference.serve.tools import Tools, call_lines, in_order, read_tools
from inference.serve.typed_fields import read
from inference.session.answer import AnswerEnd

_MOST_STOPS = 64
_MOST_NAMED = 32  # fields in a header of the answer


@dataclass(frozen=True)
class Medium:
    """What one mark of the messages shows. source: its `data:` URL or its file, not yet read.
    where: its place in the request."""

    kind: Literal["image", "video"]
    source: str | Path
    where: str
    frames: FrameChoice = field(default_factory=FrameChoice)


@dataclass
class Question:
    """A checked request. `media` are those of the messages' marks, in order."""

    messages: list[Message]
    media: list[Medium]
    sampling: Sampling
    max_tokens: int | None  # None: as many as usual, or as the context has room for
    stop: list[str]
    stop_in_answer: bool  # a stop text that was said is part of the answer
    ignore_end: bool  # the answer goes on where the model ends it
    end: AnswerEnd
    unfinished: bool  # the last message is an answer that is to be continued
    stream: bool
    usage: bool  # a stream ends with a piece that has the counts
    usage_so_far: bool  # all its pieces have them
    count: int  # of answers
    likely: int | None  # log-probabilities of so many tokens beside each that is said; None: none
    schema: dict[str, Any] | None  # of the JSON that the answer is
    tools: Tools | None  # which the answer may call
    ignored: list[str]  # fields that the model does not see, for the answer's header
    name: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def schema_field(self) -> str:
        """The field that asks for the schema."""
        return "tools" if self.tools is not None and self.tools.needed else "response_format"

    @property
    def samplings(self) -> list[Sampling]:
        """The sampling of each answer: the first as for a single one, the others with seeds of
        their own."""
        seed = self.sampling.seed
        assert seed is not None
        lowest, highest = SEEDS
        seeds = (lowest + (seed + n - lowest) % (highest - lowest + 1) for n in range(self.count))
        return [replace(self.sampling, seed=own) for own in seeds]

    def headers(self) -> dict[str, str]:
        """Headers of the answer: they name what was given and the model does not see."""
        if not self.ignored:
            return {}
        more = ", ..." if len(self.ignored) > _MOST_NAMED else ""
        return {"X-Moss-Ignored": ", ".join(self.ignored[:_MOST_NAMED]) + more}


def read_question(body: Any, limits: Limits, folders: MediaFolders = NO_FOLDERS) -> Question:
    """Checks a request; Refused names the field. folders: those of its `file:` URLs."""
    if not isinstance(body, dict):
        raise Refused("invalid_value", "the request must be an object")
    request = read(ChatRequest, body, limits)
    check_model(request.model, "model")
    tools = read_tools(request, body.get("tools"))
    reader = _Messages(limits, _frame_choice(request), folders)
    goes_on = request.continue_final_message
    messages = reader.read(request.messages, goes_on, tools)
    _check_last(request, messages[-1].role)
    schema = _schema(request.response_format)
    schema = schema if tools is None else tools.schema(schema)
    question = Question(
        messages=messages,
        media=reader.media,
        sampling=_sampling(request),
        max_tokens=_max_tokens(request),
        stop=_stop(request.stop, limits),
        stop_in_answer=request.include_stop_str_in_output,
        ignore_end=request.ignore_eos,
        end=_end(request),
        unfinished=goes_on,
        stream=request.stream,
        usage=request.stream_options.include_usage,
        usage_so_far=request.stream_options.continuous_usage_stats,
        count=request.n,
        likely=_likely(request),
        schema=schema,
        tools=tools,
        ignored=reader.ignored,
    )
    for name, value in (("ignore_eos", question.ignore_end), ("min_tokens", question.end.least)):
        if schema is not None and value:
            raise Refused("invalid_value", f"{name}: {question.schema_field} says the end", name)
    return question


def check_tokens(question: Question, count: int) -> None:
    """Refuses ids that are none of the `count` tokens which the model can say."""
    token_fields = {
        "stop_token_ids": question.end.tokens,
        "logit_bias": question.sampling.logit_bias,
    }
    for name, tokens in token_fields.items():
        for token in tokens:
            if token >= count:
                words = f"{name}: {token}: the model says tokens from 0 to {count - 1}"
                raise Refused("invalid_value", words, name)


def _check_last(request: ChatRequest, role: str) -> None:
    """Refuses a last message that is not the one to answer, or to continue."""
    goes_on, field = request.continue_final_message, "add_generation_prompt"
    if request.add_generation_prompt == goes_on:
        words = f"{field}: must be the opposite of continue_final_message"
        raise Refused("invalid_value", words, field)
    if goes_on and role != "assistant":
        field = "continue_final_message"
        raise Refused("invalid_value", f"{field}: the last message is not the assistant's", field)
    if not goes_on and role == "assistant":
        words = "messages: the last one is the assistant's: with continue_final_message true "
        raise Refused("invalid_value", f"{words}the answer goes on from it", "messages")


class _Messages:
    """Writes the messages, and collects their media and what the model does not see."""

    def __init__(self, limits: Limits, frames: Mapping[str, Any], folders: MediaFolders) -> None:
        """`frames`: fields of FrameChoice for videos that do not say themselves."""
        self._limits, self._frames, self._folders = limits, frames, folders
        self.media: list[Medium] = []
        self.ignored: list[str] = []
        self._left = 0  # characters that the message may still have
        self._left_in_all = limits.text_chars
        self._written = as_typed  # its texts as the prompt takes them

    def read(self, turns: Sequence[Any], goes_on: bool, tools: Tools | None) -> list[Message]:
        """The messages without empty answers at the end, which a page sends after a stop, unless
        the request goes on from the last one. Before them a description of the tools."""
        messages = [self._message(turn, f"messages[{n}]") for n, turn in in_order(turns)]
        while not goes_on and messages[-1] == Message("assistant", "") and len(messages) > 1:
            messages.pop()
        if tools is not None:
            self._left, self._written = self._limits.prompt_chars, as_typed
            messages.insert(0, Message("system", self._text(tools.text(), "tools")))
        return messages

    def _message(self, turn: Any, field: str) -> Message:
        if turn.name is not None:
            self.ignored.append(f"{field}.name")
        self._left = self._limits.prompt_chars
        self._written = as_system if turn.role == "system" else as_typed
        text, where = "", f"{field}.content"
        if isinstance(turn.content, str):
            text = self._text(turn.content, where)
        else:
            text = "".join(self._part(p, f"{where}[{n}]") for n, p in enumerate(turn.content))
        if isinstance(turn, Answer):
            text += self._text(turn.refusal, f"{field}.refusal")
            calls = [self._text(line, f"{field}.tool_calls") for line in call_lines(turn)]
            text = with_calls(text, calls)
        return Message(turn.role, text)

    def _part(self, part: Any, field: str) -> str:
        """The text of a part: for a picture or video its mark."""
        if isinstance(part, TextPart):
            return self._text(part.text, f"{field}.text")
        if isinstance(part, RefusalPart):
            return self._text(part.refusal, f"{field}.refusal")
        return self._image(part, field) if isinstance(part, ImagePart) else self._video(part, field)

    def _image(self, part: ImagePart, field: str) -> str:
        field = f"{field}.image_url"
        self._see(part.image_url.detail, field)
        address = self._folders.address(part.image_url.url, field)
        if isinstance(address, str) and address[:11].lower() == "data:video/":
            return self._show_video(address, self._frames, field)  # as Gradio's chat sends one
        self._add_medium(Medium("image", address, field))
        return IMAGE_MARK

    def _video(self, part: VideoPart, field: str) -> str:
        field, own, frames = f"{field}.video_url", part.video_url.chosen, part.chosen
        self._see(part.video_url.detail, field)
        address = self._folders.address(part.video_url.url, field)
        twice = next((name for name in own if frames.get(name, own[name]) != own[name]), None)
        if twice:
            raise Refused("invalid_value", f"{field}.{twice}: is given twice", f"{field}.{twice}")
        return self._show_video(address, {**frames, **own} or self._frames, field)

    def _show_video(self, address: str | Path, chosen: Mapping[str, Any], field: str) -> str:
        if "num_frames" in chosen and len(chosen) > 1:
            words = f"{field}: num_frames leaves nothing for {', '.join(chosen)}: give one of them"
            raise Refused("invalid_value", words, field)
        if chosen.get("min_frames", 1) > chosen.get("max_frames", math.inf):
            raise Refused("invalid_value", f"{field}: min_frames is more than max_frames", field)
        self._add_medium(Medium("video", address, field, FrameChoice(**chosen)))
        return VIDEO_MARK

    def _see(self, detail: str, field: str) -> None:
        if detail != "auto":  # every picture is seen as one tile of the model's size
            self.ignored.append(f"{field}.detail")

    def _add_medium(self, medium: Medium) -> None:
        if len(self.media) >= self._limits.frames:
            words = f"{medium.where}: more than {self._limits.frames} frames"
            raise Refused("too_large", words, medium.where)
        self.media.append(medium)

    def _text(self, text: str, field: str) -> str:
        """A text for the prompt."""
        self._left -= len(text)
        self._left_in_all -= len(text)
        if self._left_in_all < 0:
            most = self._limits.text_chars
            raise Refused("too_large", f"messages: more than {most} characters", "messages")
        if self._left < 0:
            most = self._limits.prompt_chars
            raise Refused("too_large", f"{field}: more than {most} characters", field)
        return self._written(text)


def _frame_choice(request: ChatRequest) -> dict[str, Any]:
    """Which frames are taken of videos that say nothing themselves: by the request's fields."""
    processed, read = request.mm_processor_kwargs.chosen, request.media_io_kwargs.video.chosen
    if processed and read:
        field = "media_io_kwargs.video"
        words = f"{field}: mm_processor_kwargs says which frames, too: give one of them"
        raise Refused("invalid_value", words, field)
    return processed or read


def _sampling(request: ChatRequest) -> Sampling:
    values = {entry.name: getattr(request, entry.name) for entry in fields(Sampling)}
    return Sampling(**{name: value for name, value in values.items() if value is not None})


def _max_tokens(request: ChatRequest) -> int | None:
    new, old = request.max_completion_tokens, request.max_tokens
    if None not in (new, old) and new != old:
        words = "max_tokens: is not max_completion_tokens: give one"
        raise Refused("invalid_value", words, "max_tokens")
    return old if new is None else new


def _end(request: ChatRequest) -> AnswerEnd:
    least, most = request.min_tokens, _max_tokens(request)
    if most is not None and least > most:
        words = f"min_tokens: {least}: is more than max_tokens, {most}"
        raise Refused("invalid_value", words, "min_tokens")
    return AnswerEnd(least, frozenset(request.stop_token_ids), request.include_stop_str_in_output)


def _likely(request: ChatRequest) -> int | None:
    if request.top_logprobs and not request.logprobs:
        raise Refused("invalid_value", "top_logprobs: needs logprobs true", "top_logprobs")
    return request.top_logprobs if request.logprobs else None


def _schema(response_format: ResponseFormat) -> dict[str, Any] | None:
    """The schema of the JSON that is asked for; None: the answer is text."""
    field = "response_format.json_schema"
    if (response_format.type == "json_schema") != (response_format.json_schema is not None):
        raise Refused("invalid_value", f"{field}: goes with type json_schema, and only so", field)
    if response_format.json_schema is not None:
        return response_format.json_schema.schema_
    return {"type": "object"} if response_format.type == "json_object" else None


def _stop(texts: Sequence[str], limits: Limits) -> list[str]:
    if len(texts) > _MOST_STOPS or sum(map(len, texts)) > limits.prompt_chars:
        words = f"stop: more than {_MOST_STOPS} texts or {limits.prompt_chars} characters"
        raise Refused("too_large", words, "stop")
    return list(texts)
