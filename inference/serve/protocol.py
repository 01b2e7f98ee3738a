"""Reads and checks a client's messages: text is JSON with a `type`, binary is a picture."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from inference.engine.sampling import Sampling
from inference.serve.data_urls import data_url, media_bytes
from inference.serve.known_fields import EVENTS, INPUT_IMAGE, INPUT_TEXT, ITEM, SESSION
from inference.serve.limits import SAMPLING_RANGES, Limits, Refused

# Name in session.update -> (name in SessionConfig, least, largest, whole numbers only).
_NUMBERS = {
    "pace": ("pace", 1, 1000, True),
    "frame_interval": ("frame_interval", 0.01, 3600, False),
    "max_output_tokens": ("max_new_tokens", 1, 10**6, True),
}


@dataclass
class ImageMessage:
    """A frame; without data: the second and the prompt of the binary message that follows."""

    data: bytes | None
    at: float | None
    prompt: str | None


def read_json(data: str | bytes, what: str, most: int) -> Any:
    """What a client sends; Refused for what is not JSON, and for a field that stands twice.

    most: values and escaped characters in it. They are counted before it is parsed: what makes a
    parser slow is how many they are, not how long (62 MB of brackets take 6 s, of base64 50 ms).
    """
    text = data.encode("utf-8", "replace") if isinstance(data, str) else data
    if sum(map(text.count, _MARKS)) > most:
        raise Refused("too_large", f"{what} has more than {most} values")
    try:
        return json.loads(data, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", f"{what} is not JSON: {error}") from None


_MARKS = (b"[", b"{", b",", b"\\")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise Refused("invalid_value", f"{name!r:.60} is given twice")
        fields[name] = value
    return fields


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def parse(text: str, most: int = 100_000) -> dict[str, Any]:
    """A text message; Refused if it is not an object with a known type. most: as in read_json."""
    message = read_json(text, "the message", most)
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise Refused("invalid_message", "a message is an object with a `type`", "type")
    if message["type"] not in EVENTS:
        known = ", ".join(EVENTS)
        raise Refused("unknown_type", f"type {message['type']!r:.60}: known are {known}", "type")
    EVENTS[message["type"]].check(message)
    return message


def read_update(message: dict[str, Any], now: Sampling, limits: Limits) -> dict[str, Any]:
    """The fields of SessionConfig that a `session.update` changes."""
    update = message.get("session")
    if not isinstance(update, dict):
        raise Refused("invalid_message", "session: expected an object", "session")
    SESSION.check(update, "session.")
    changes: dict[str, Any] = {}
    sampling = asdict(now)
    for key, value in update.items():
        field = f"session.{key}"
        if value is None:  # as if it was left out, where it is no value
            changes |= {"pace": None} if key == "pace" else {}
        elif key in ("instructions", "prompt"):
            name = "system_prompt" if key == "instructions" else key
            changes[name] = _text(value, field, limits)
        elif key == "source":
            if value not in ("live", "file"):
                raise Refused("invalid_value", f"{field}: live or file, not {value!r:.60}", field)
            changes |= {"live": value == "live", "clock": "wall" if value == "live" else "media"}
        elif key in _NUMBERS:
            name, least, largest, whole = _NUMBERS[key]
            changes[name] = read_number(value, field, least, largest, whole=whole)
        else:
            sampling[key] = read_setting(value, key, field)
            changes["sampling"] = Sampling(**sampling)
    return changes


def read_image(message: dict[str, Any], limits: Limits) -> ImageMessage:
    """An `input_image_buffer.append`."""
    data, at, prompt = (message.get(key) for key in ("image", "ts", "prompt"))
    if at is not None:
        at = read_number(at, "ts", 0, 1e9, whole=False)
    if prompt is not None:
        prompt = _text(prompt, "prompt", limits)
    if data is not None:
        data = media_bytes(data, "image", limits.frame_bytes)
    return ImageMessage(data, at, prompt or None)


def read_item(message: dict[str, Any], limits: Limits) -> tuple[str, bytes | None]:
    """A `conversation.item.create`: the user's text and, if there is one, a picture."""
    item = message.get("item")
    if not isinstance(item, dict) or item.get("type") not in (None, "message"):
        raise Refused("invalid_message", "item: expected an object of type `message`", "item")
    ITEM.check(item, "item.")
    if item.get("role") not in (None, "user"):
        raise Refused("invalid_value", "item.role: only `user` may write items", "item.role")
    content = item.get("content")
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    if not isinstance(content, list) or not content:
        raise Refused("invalid_message", "item.content: expected a list of parts", "item.content")
    texts, pictures = [], []
    for number, part in enumerate(content):
        field = f"item.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "input_text":
            INPUT_TEXT.check(part, f"{field}.")
            texts.append(_text(part.get("text") or "", f"{field}.text", limits))
        elif kind == "input_image":
            INPUT_IMAGE.check(part, f"{field}.")
            url = part.get("image_url")
            pictures.append(data_url(url, f"{field}.image_url", limits.frame_bytes))
        else:
            raise Refused("invalid_value", f"{field}.type: input_text or input_image", field)
    if len(pictures) > 1 or not "".join(texts).strip():
        raise Refused("invalid_value", "an item is a text with at most one picture", "item.content")
    return _text("\n".join(texts), "item.content", limits), pictures[0] if pictures else None


def read_number(value: object, field: str, least: float, largest: float, *, whole: bool) -> Any:
    """A finite number from `least` to `largest`; Refused names the field. 7.0 is a whole number."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if whole and isinstance(number, float):
        number = int(number) if number.is_integer() else math.nan
    if not least <= number <= largest:  # NaN is not
        kind = "a whole number" if whole else "a number"
        detail = f"{field}: {value!r:.60}: expected {kind} from {least:.19g} to {largest:.19g}"
        raise Refused("invalid_value", detail, field)
    return number


def read_setting(value: object, name: str, field: str = "") -> Any:
    """A value of a field of Sampling; Refused."""
    whole = name in ("top_k", "seed")
    return read_number(value, field or name, *SAMPLING_RANGES[name], whole=whole)


def _text(value: object, field: str, limits: Limits) -> str:
    if not isinstance(value, str):
        raise Refused("invalid_value", f"{field}: expected a text", field)
    if len(value) > limits.prompt_chars:
        detail = f"{field}: {len(value)} characters are more than {limits.prompt_chars}"
        raise Refused("too_large", detail, field)
    return value
