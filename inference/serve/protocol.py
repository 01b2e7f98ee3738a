"""Reads and checks a client's messages: text is JSON with a `type`, binary is a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from inference.engine.sampling import Sampling
from inference.serve.data_urls import data_url, media_bytes
from inference.serve.hub import MODEL
from inference.serve.limits import Limits, Refused
from inference.serve.messages import (
    EVENTS,
    CreateItem,
    Event,
    ImageAppend,
    SessionUpdate,
    TextInput,
)
from inference.serve.typed_fields import kind, read

# Name in session.update -> name in SessionConfig, where it is another.
_NAMES = {"instructions": "system_prompt", "max_output_tokens": "max_new_tokens"}
_CLIENT_NAMES = {
    **{ours: name for name, ours in _NAMES.items()},
    "live": "source",
    "clock": "source",
}


@dataclass
class ImageMessage:
    """A frame; without data: the second and the prompt of the binary message that follows."""

    data: bytes | None
    at: float | None
    prompt: str | None


def read_json(data: str | bytes, what: str, most: int) -> Any:
    """What a client sends; Refused for what is not JSON, is nested too deep for what reads it, and
    for a field that stands twice.

    most: values and escaped characters in it. They are counted before it is parsed: what makes a
    parser slow is how many they are, not how long (62 MB of brackets take 6 s, of base64 50 ms).
    """
    text = data.encode("utf-8", "replace") if isinstance(data, str) else data
    if sum(map(text.count, _MARKS)) > most:
        raise Refused("too_large", f"{what} has more than {most} values")
    try:
        value = json.loads(data, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", f"{what} is not JSON: {error}") from None
    if text.count(b"[") + text.count(b"{") > _DEEPEST and _is_deep(value):
        raise Refused("too_large", f"{what} is nested more than {_DEEPEST} deep")
    return value


_MARKS = (b"[", b"{", b",", b"\\")
_DEEPEST = 128  # as a grammar's schemas; whoever reads a level by a call has many to spare


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        inner = [one.values() if isinstance(one, dict) else one for one in level
                 if isinstance(one, dict | list)]  # fmt: skip
        level = [one for values in inner for one in values]
    return any(isinstance(one, dict | list) for one in level)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise Refused("invalid_value", f"{name!r:.60} is given twice")
        fields[name] = value
    return fields


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def parse(text: str, limits: Limits) -> Event:
    """A text message, one of EVENTS; Refused if it is not an object with a known type."""
    message = read_json(text, "the message", limits.json_values)
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise Refused("invalid_message", "a message is an object with a `type`", "type")
    if message["type"] not in EVENTS:
        types = ", ".join(EVENTS)
        raise Refused("unknown_type", f"type {message['type']!r:.60}: known are {types}", "type")
    return read(EVENTS[message["type"]], message, limits, shape="invalid_message")


def check_model(name: str | None, field: str) -> None:
    """Refused where a client wants another model; None: it does not say which."""
    if name is not None and name != MODEL:
        words = f"{field}: {name!r:.60}: this server has {MODEL}"
        raise Refused("model_not_found", words, field)


def read_update(message: SessionUpdate, now: Sampling) -> dict[str, Any]:
    """The fields of SessionConfig that a `session.update` changes."""
    update = message.session
    check_model(update.model, "session.model")
    set_now = [n for n in update.model_fields_set if kind(type(update), n)[0] == "read"]
    values = {name: getattr(update, name) for name in set_now}
    names = {entry.name for entry in fields(Sampling)} & set(values)
    rest = [name for name in values if name not in names | {"source", "model"}]
    changes = {_NAMES.get(name, name): values[name] for name in rest}
    if names:
        sampling = {**asdict(now), **{name: values[name] for name in names}}
        changes["sampling"] = Sampling(**sampling)
    if "source" in values:
        live = update.source == "live"
        changes |= {"live": live, "clock": "wall" if live else "media"}
    return changes


def refused_update(error: ValueError) -> Refused:
    """The error of a refused change of a session, with the client's name of the field."""
    name, _, words = str(error).partition(": ")
    field = f"session.{_CLIENT_NAMES.get(name, name)}"
    return Refused("invalid_value", f"{field}: {words}", field)


def read_image(message: ImageAppend, limits: Limits) -> ImageMessage:
    """Reads an `input_image_buffer.append`."""
    data = message.image
    if data is not None:
        data = media_bytes(data, "image", limits.frame_bytes)
    return ImageMessage(data, message.ts, message.prompt or None)


def read_item(message: CreateItem, limits: Limits) -> tuple[str, bytes | None]:
    """Reads a `conversation.item.create`: the user's text and, if there is one, a picture."""
    content = message.item.content
    texts, pictures = [content] if isinstance(content, str) else [], []
    for number, part in enumerate(() if isinstance(content, str) else content):
        if isinstance(part, TextInput):
            texts.append(part.text)
        else:
            field = f"item.content[{number}].image_url"
            pictures.append(data_url(part.image_url, field, limits.frame_bytes))
    if len(pictures) > 1 or not "".join(texts).strip():
        raise Refused("invalid_value", "an item is a text with at most one picture", "item.content")
    text = "\n".join(texts)
    if len(text) > limits.prompt_chars:
        words = f"item.content: {len(text)} characters are more than {limits.prompt_chars}"
        raise Refused("too_large", words, "item.content")
    return text, pictures[0] if pictures else None
