"""A request for `/v1/chat/completions`, read and checked: messages, media, how to answer."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from data_pipeline.prompts import as_system, as_typed
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, Message
from inference.engine.choice import MOST_LIKELY
from inference.engine.sampling import SEEDS, Sampling
from inference.serve import known_fields as known
from inference.serve.data_urls import data_name
from inference.serve.decoding import FrameChoice
from inference.serve.hub import MODEL
from inference.serve.limits import Limits, Refused
from inference.serve.protocol import read_number, read_setting

_MOST_STOPS = 64
_MOST_NAMED = 32  # fields in a header of the answer
_FPS = (0.01, 1000)


@dataclass(frozen=True)
class Medium:
    """What one mark of the messages shows. url: `data:`, not yet read. where: its place in the
    request."""

    kind: Literal["image", "video"]
    url: str
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
    unfinished: bool  # the last message is an answer that is to be continued
    stream: bool
    usage: bool  # a stream ends with a piece that has the counts
    count: int  # of answers
    likely: int | None  # log-probabilities of so many tokens beside each that is said; None: none
    schema: dict[str, Any] | None  # of the JSON that the answer is
    ignored: list[str]  # fields that the model does not see, for the answer's header
    name: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def samplings(self) -> list[Sampling]:
        """Of each answer: the first as for one alone, the others with seeds of their own."""
        seed = self.sampling.seed
        assert seed is not None
        lowest, highest = SEEDS
        seeds = (lowest + (seed + n - lowest) % (highest - lowest + 1) for n in range(self.count))
        return [replace(self.sampling, seed=own) for own in seeds]

    def headers(self) -> dict[str, str]:
        """Of the answer: they name what was given and the model does not see."""
        if not self.ignored:
            return {}
        more = ", ..." if len(self.ignored) > _MOST_NAMED else ""
        return {"X-Moss-Ignored": ", ".join(self.ignored[:_MOST_NAMED]) + more}


def read_question(body: Any, limits: Limits) -> Question:
    """Checks a request; Refused names the field."""
    if not isinstance(body, dict):
        raise Refused("invalid_value", "the request must be an object")
    known.REQUEST.check(body)
    _check_model(body.get("model"))
    _check_tools(body)
    reader = _Messages(limits, _frame_choice(body, limits))
    goes_on = _flag(body, "continue_final_message")
    messages = reader.read(body.get("messages"), goes_on)
    _check_last(body, messages[-1].role, goes_on)
    schema = _schema(body.get("response_format"))
    ignore_end = _flag(body, "ignore_eos")
    if schema is not None and ignore_end:
        raise Refused("invalid_value", "ignore_eos: response_format says the end", "ignore_eos")
    options = _object(body.get("stream_options"), "stream_options", known.STREAM_OPTIONS)
    return Question(
        messages=messages,
        media=reader.media,
        sampling=_sampling(body),
        max_tokens=_max_tokens(body, limits.max_tokens),
        stop=_stop(body.get("stop"), limits),
        stop_in_answer=_flag(body, "include_stop_str_in_output"),
        ignore_end=ignore_end,
        unfinished=goes_on,
        stream=_flag(body, "stream"),
        usage=_flag(options, "include_usage", "stream_options."),
        count=_count(body.get("n"), limits.answers),
        likely=_likely(body),
        schema=schema,
        ignored=reader.ignored,
    )


def _check_model(name: object) -> None:
    if name is not None and name != MODEL:
        raise Refused("model_not_found", f"model: {name!r:.60}: this server has {MODEL}", "model")


def _check_tools(body: Mapping[str, Any]) -> None:
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        words = f"tool_choice: {choice!r:.60} is not supported: this model has no tools"
        raise Refused("unsupported", words, "tool_choice")
    if body.get("tools") and choice != "none":
        words = "tools: not supported: this model has no tools (taken with tool_choice none)"
        raise Refused("unsupported", words, "tools")


def _check_last(body: Mapping[str, Any], role: str, goes_on: bool) -> None:
    """Refuses a last message that is not the one to answer or, with `goes_on`, to continue."""
    field = "add_generation_prompt"
    if body.get(field) is not None and _flag(body, field) == goes_on:
        words = f"{field}: must be the opposite of continue_final_message"
        raise Refused("invalid_value", words, field)
    if goes_on and role != "assistant":
        field = "continue_final_message"
        raise Refused("invalid_value", f"{field}: the last message is not the assistant's", field)
    if not goes_on and role != "user":
        words = "messages: the last one must be the user's"
        if role == "assistant":
            words += ", or continue_final_message true, to go on from it"
        raise Refused("invalid_value", words, "messages")


class _Messages:
    """Reads the messages, and collects their media and what the model does not see."""

    def __init__(self, limits: Limits, frames: Mapping[str, Any]) -> None:
        """`frames`: fields of FrameChoice for videos that do not say themselves."""
        self._limits, self._frames = limits, frames
        self.media: list[Medium] = []
        self.ignored: list[str] = []
        self._left = 0  # characters that the message may still have
        self._left_in_all = limits.text_chars
        self._written: Callable[[str], str] = as_typed  # its texts as the prompt takes them

    def read(self, turns: object, goes_on: bool) -> list[Message]:
        """Without an empty answer at the end, which a page sends after a stop, unless the request
        goes on from it."""
        if not isinstance(turns, list) or not turns:
            raise Refused("invalid_value", "messages: expected a list of messages", "messages")
        messages = [self._message(turn, f"messages[{n}]") for n, turn in enumerate(turns)]
        if not goes_on and messages[-1] == Message("assistant", "") and len(messages) > 1:
            messages.pop()
        return messages

    def _message(self, turn: Any, field: str) -> Message:
        role: Any = turn.get("role") if isinstance(turn, dict) else None
        role = "system" if role == "developer" else role
        if role in ("tool", "function"):
            words = f"{field}.role: {role}: this model has no tools"
            raise Refused("unsupported", words, f"{field}.role")
        if role not in ("system", "user", "assistant"):
            words = f"{field}.role: {role!r:.60}: expected system, user or assistant"
            raise Refused("invalid_value", words, f"{field}.role")
        (known.ANSWER if role == "assistant" else known.MESSAGE).check(turn, f"{field}.")
        if turn.get("name") is not None:
            self.ignored.append(f"{field}.name")
        content = turn.get("content")
        if content is None and role != "assistant":
            words = f"{field}.content: needed: a text or a list of parts"
            raise Refused("invalid_value", words, f"{field}.content")
        self._left = self._limits.prompt_chars
        self._written = as_system if role == "system" else as_typed
        text = self._content(content, f"{field}.content", role)
        return Message(role, text + self._text(turn.get("refusal"), f"{field}.refusal"))

    def _content(self, content: Any, field: str, role: str) -> str:
        if content is None or isinstance(content, str):
            return self._text(content, field)
        if not isinstance(content, list):
            raise Refused("invalid_value", f"{field}: expected a text or a list of parts", field)
        return "".join(self._part(part, f"{field}[{n}]", role) for n, part in enumerate(content))

    def _part(self, part: Any, field: str, role: str) -> str:
        """The text of a part: for a picture or video its mark."""
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" or (kind == "refusal" and role == "assistant"):
            fields = known.TEXT_PART if kind == "text" else known.REFUSAL_PART
            fields.check(part, f"{field}.")
            return self._text(part.get(kind), f"{field}.{kind}")
        if kind == "image_url":
            known.IMAGE_PART.check(part, f"{field}.")
            return self._image(part.get(kind), f"{field}.{kind}")
        if kind == "video_url":
            known.VIDEO_PART.check(part, f"{field}.")
            own = _frame_fields(part, f"{field}.", self._limits)
            return self._video(part.get(kind), f"{field}.{kind}", own)
        words = f"{field}.type: {kind!r:.60}: expected text, image_url or video_url"
        raise Refused("invalid_value", words, f"{field}.type")

    def _image(self, given: Any, field: str) -> str:
        url = {"url": given} if isinstance(given, str) else _object(given, field, known.IMAGE_URL)
        self._add_medium(Medium("image", data_name(url.get("url"), field), field))
        return IMAGE_MARK

    def _video(self, given: Any, field: str, frames: Mapping[str, Any]) -> str:
        url = {"url": given} if isinstance(given, str) else _object(given, field, known.VIDEO_URL)
        address = data_name(url.get("url"), field)
        own = _frame_fields(url, f"{field}.", self._limits)
        twice = next((name for name in own if frames.get(name, own[name]) != own[name]), None)
        if twice:
            raise Refused("invalid_value", f"{field}.{twice}: is given twice", f"{field}.{twice}")
        chosen = {**frames, **own} or self._frames
        if "num_frames" in chosen and len(chosen) > 1:
            words = f"{field}: num_frames leaves nothing for {', '.join(chosen)}: give one of them"
            raise Refused("invalid_value", words, field)
        if chosen.get("min_frames", 1) > chosen.get("max_frames", math.inf):
            raise Refused("invalid_value", f"{field}: min_frames is more than max_frames", field)
        self._add_medium(Medium("video", address, field, FrameChoice(**chosen)))
        return VIDEO_MARK

    def _add_medium(self, medium: Medium) -> None:
        if len(self.media) >= self._limits.frames:
            words = f"{medium.where}: more than {self._limits.frames} frames"
            raise Refused("too_large", words, medium.where)
        self.media.append(medium)

    def _text(self, text: object, field: str) -> str:
        """A text for the prompt; null is an empty one."""
        if text is None:
            return ""
        if not isinstance(text, str):
            raise Refused("invalid_value", f"{field}: expected a text", field)
        self._left -= len(text)
        self._left_in_all -= len(text)
        if self._left_in_all < 0:
            most = self._limits.text_chars
            raise Refused("too_large", f"messages: more than {most} characters", "messages")
        if self._left < 0:
            most = self._limits.prompt_chars
            raise Refused("too_large", f"{field}: more than {most} characters", field)
        return self._written(text)


def _frame_choice(body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Of the videos of the request that say nothing themselves."""
    processor = _object(body.get("mm_processor_kwargs"), "mm_processor_kwargs", known.PROCESSOR)
    reading = _object(body.get("media_io_kwargs"), "media_io_kwargs", known.MEDIA_IO)
    video = _object(reading.get("video"), "media_io_kwargs.video", known.PROCESSOR)
    processed = _frame_fields(processor, "mm_processor_kwargs.", limits)
    read = _frame_fields(video, "media_io_kwargs.video.", limits)
    if processed and read:
        field = "media_io_kwargs.video"
        words = f"{field}: mm_processor_kwargs says which frames, too: give one of them"
        raise Refused("invalid_value", words, field)
    return processed or read


def _frame_fields(given: Mapping[str, Any], where: str, limits: Limits) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name in known.FRAMES:
        value = given.get(name)
        if value is not None and name == "fps":
            chosen[name] = float(read_number(value, where + name, *_FPS, whole=False))
        elif value is not None:
            chosen[name] = read_number(value, where + name, 1, limits.frames, whole=True)
    return chosen


def _object(value: Any, field: str, fields: known.Fields) -> dict[str, Any]:
    """A checked object; null is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused("invalid_value", f"{field}: {value!r:.60}: expected an object", field)
    fields.check(value, f"{field}.")
    return value


def _sampling(body: Mapping[str, Any]) -> Sampling:
    names = [entry.name for entry in fields(Sampling) if body.get(entry.name) is not None]
    return Sampling(**{name: read_setting(body[name], name) for name in names})


def _max_tokens(body: Mapping[str, Any], largest: int) -> int | None:
    names = [n for n in ("max_completion_tokens", "max_tokens") if body.get(n) is not None]
    given = [read_number(body[name], name, 1, largest, whole=True) for name in names]
    if len(set(given)) > 1:
        raise Refused("invalid_value", f"{names[1]}: is not {names[0]}: give one", names[1])
    return given[0] if given else None


def _count(value: Any, most: int) -> int:
    return 1 if value is None else int(read_number(value, "n", 1, most, whole=True))


def _likely(body: Mapping[str, Any]) -> int | None:
    value = body.get("top_logprobs")
    count = 0 if value is None else read_number(value, "top_logprobs", 0, MOST_LIKELY, whole=True)
    if _flag(body, "logprobs"):
        return int(count)
    if count:
        raise Refused("invalid_value", "top_logprobs: needs logprobs true", "top_logprobs")
    return None


def _schema(value: Any) -> dict[str, Any] | None:
    """Of `response_format`; None: the answer is text."""
    given = _object(value, "response_format", known.RESPONSE_FORMAT)
    kind, field = given.get("type", "text"), "response_format.json_schema"
    if kind not in ("text", "json_object", "json_schema"):
        words = f"response_format.type: {kind!r:.60}: expected text, json_object or json_schema"
        raise Refused("invalid_value", words, "response_format.type")
    if (kind == "json_schema") != (given.get("json_schema") is not None):
        raise Refused("invalid_value", f"{field}: goes with type json_schema, and only so", field)
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    schema = _object(given["json_schema"], field, known.JSON_SCHEMA).get("schema")
    if not isinstance(schema, dict):
        raise Refused("invalid_value", f"{field}.schema: expected a JSON Schema", f"{field}.schema")
    return schema


def _flag(body: Mapping[str, Any], name: str, where: str = "") -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        words = f"{where}{name}: {value!r:.60}: expected true or false"
        raise Refused("invalid_value", words, where + name)
    return bool(value)


def _stop(value: Any, limits: Limits) -> list[str]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise Refused("invalid_value", "stop: expected a text, or a list of texts", "stop")
    if len(texts) > _MOST_STOPS or sum(map(len, texts)) > limits.prompt_chars:
        words = f"stop: more than {_MOST_STOPS} texts or {limits.prompt_chars} characters"
        raise Refused("too_large", words, "stop")
    return texts
