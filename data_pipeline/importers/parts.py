"""Contents that are lists of parts, as OpenAI's and transformers' messages have them, to texts.

A part with a medium of its own gives it to the record; one that only says `image` or `video` stands
for the next medium of the record.
"""

from __future__ import annotations

import json
from typing import Any

from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, SampleError

_MARKS = {
    "image": IMAGE_MARK, "image_url": IMAGE_MARK, "input_image": IMAGE_MARK,
    "video": VIDEO_MARK, "video_url": VIDEO_MARK, "input_video": VIDEO_MARK,
}  # fmt: skip
_TEXTS = ("text", "input_text", "output_text")
_PLACES = ("image", "video", "image_url", "video_url", "url", "path", "bytes")
_KNOWN = frozenset((*_PLACES, "type", "text", "index"))


def plain_contents(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The record with texts for contents, media of the parts under `images` and `videos`.

    name: of the messages, which may be the JSON of their list. SampleError for unknown parts.
    """
    messages = record.get(name)
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise SampleError("bad_json", f"{name}: {error}") from None
        record = record | {name: messages}
    if not isinstance(messages, list) or not any(map(_has_parts, messages)):
        return record
    media: dict[str, list[Any]] = {"images": [], "videos": []}
    plain = []
    for i, message in enumerate(messages):
        if _has_parts(message):
            texts = [_part(part, f"{name}[{i}].content", media) for part in message["content"]]
            message = message | {"content": "".join(texts)}
        plain.append(message)
    return record | {name: plain} | {field: given for field, given in media.items() if given}


def _has_parts(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), list)


def _part(part: Any, field: str, media: dict[str, list[Any]]) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXTS and isinstance(part.get("text"), str):
        if any(part.get(place) for place in _PLACES):
            detail = f"{field}: {part!r:.80}: a text that names a medium: make two parts of it"
            raise SampleError("bad_schema", detail)
        return str(part["text"])
    if kind not in _MARKS:
        raise SampleError("bad_schema", f"{field}: {part!r:.80}: a part is a text, image or video")
    given = next((part[place] for place in _PLACES if part.get(place)), None)
    if given is not None:
        if isinstance(given, bytes):
            given = {"bytes": given, "path": part.get("path")}
        elif isinstance(given, dict) and isinstance(given.get("url"), str):
            given = given["url"]
        more = {name: value for name, value in part.items() if name not in _KNOWN}
        if any(value is not None for value in more.values()):  # told as unused, with its name
            own = given if isinstance(given, dict) else {"path": given}
            given = own | more
        media["images" if _MARKS[kind] == IMAGE_MARK else "videos"].append(given)
    return _MARKS[kind]
