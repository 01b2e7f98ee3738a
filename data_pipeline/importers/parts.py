"""Contents that are lists of parts, as OpenAI's and transformers' messages have them, to texts.

A part or message with a medium of its own gives it to the record; a part that only says `image` or
`video` stands for the next medium of the record.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from data_pipeline.importers.draft import (
    IMAGE_FIELDS,
    VIDEO_FIELDS,
    as_list,
    medium_name,
    role_of,
)
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, SampleError
from data_pipeline.strict_json import loads

_MARKS = {
    "image": IMAGE_MARK, "image_url": IMAGE_MARK, "input_image": IMAGE_MARK,
    "video": VIDEO_MARK, "video_url": VIDEO_MARK, "input_video": VIDEO_MARK,
}  # fmt: skip
_TEXTS = ("text", "input_text", "output_text")
_PLACES = ("image", "video", "image_url", "video_url", "url", "path", "bytes")
# Of messages: the fields with media, where the media go, and the marks that place them.
_OWN = (
    (IMAGE_FIELDS, "images", (IMAGE_MARK, "<image>")),
    (VIDEO_FIELDS, "videos", (VIDEO_MARK, "<video>")),
)
_SOURCE, _BASE64 = "source", "base64"  # where Anthropic's and transformers' parts have it
_KNOWN = frozenset((*_PLACES, _SOURCE, _BASE64, "type", "text", "index"))
_LONG = 256  # characters without a space, of which no option of a medium has so many


def plain_contents(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The record with texts for contents, media of the parts and messages under `images` and
    `videos`.

    name: of the messages, which may be the JSON of their list. SampleError for unknown parts, and
    where the record and its messages name different media.
    """
    messages = record.get(name)
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        try:
            messages = loads(messages)
        except ValueError as error:
            raise SampleError("bad_json", f"{name}: {error}") from None
        record = record | {name: messages}
    if not isinstance(messages, list) or not any(map(_has_more, messages)):
        return record
    plain, media = _texts(messages, name)
    repeated = set()
    for fields, kind, _ in _OWN:
        for field in fields if media[kind] else ():
            if not record.get(field):
                continue
            own, found = as_list(record[field]), media[kind]
            if len(own) == len(found) and all(map(_is_same, own, found)):
                media[kind] = [_joined(*both) for both in zip(own, found, strict=True)]
                record = {key: value for key, value in record.items() if key != field}
            elif _repeats(own, found) and not _texts(messages, name, {kind})[1][kind]:
                repeated.add(kind)
            else:
                raise _different(field, name)
    if repeated:
        plain = _texts(messages, name, repeated)[0]
    own_media = {kind: found for kind, found in media.items() if found and kind not in repeated}
    return record | {name: plain} | own_media


def _texts(
    messages: list[Any], name: str, repeated: Collection[str] = ()
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Messages with texts for contents, and the media of their parts and their own.

    repeated: kinds that the record lists in full: such fields of a message are left out.
    """
    media: dict[str, list[Any]] = {"images": [], "videos": []}
    plain = []
    for i, message in enumerate(messages):
        for field in ("content", "value"):
            if _has_parts(message, field):
                texts = [_part(part, f"{name}[{i}].{field}", media) for part in message[field]]
                message = message | {field: "".join(texts)}
        if isinstance(message, dict):
            message = _without_media(message, media, repeated)
        plain.append(message)
    return plain, media


def _repeats(own: list[Any], found: list[Any]) -> bool:
    """Whether messages name media of their record, some perhaps again or not, in its order."""
    places: list[int] = []
    for medium in found:
        place = next((i for i, one in enumerate(own) if _is_same(one, medium)), None)
        if place is None or (place not in places and place < max(places, default=0)):
            return False
        places.append(place)
    return True


def _different(field: str, name: str) -> SampleError:
    detail = f"{field}: the record and its {name} name different media: keep one list"
    return SampleError("ambiguous_media", detail)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two fields name one medium, in whatever spelling; one path may be absolute."""
    names = [name for name in map(medium_name, (one, other)) if name is not None]
    if len(names) < 2:
        return bool(one == other)
    short, long = sorted(names, key=len)
    return short == long or (long.startswith("/") and long.endswith(f"/{short}"))


def _joined(own: Any, medium: Any) -> Any:
    """A medium of a part, with what the record's field says beyond its name."""
    if not isinstance(own, dict):
        return medium
    return own | (medium if isinstance(medium, dict) else {"path": medium})


def _has_parts(message: Any, field: str) -> bool:
    """Whether a content is a list of parts, which in ShareGPT's form are objects alone."""
    parts = message.get(field) if isinstance(message, dict) else None
    return isinstance(parts, list) and (
        field == "content" or all(isinstance(part, dict) for part in parts)
    )


def _has_more(message: Any) -> bool:
    """Whether a message may have more than a text."""
    return isinstance(message, dict) and (
        len(message) > 2 or any(isinstance(value, list) for value in message.values())
    )


def _without_media(
    message: dict[str, Any], media: dict[str, list[Any]], repeated: Collection[str]
) -> dict[str, Any]:
    """A message without media of its own; where its text has no marks, these stand before it.

    The field of an answer without marks stays, to be counted: what is learned gets no mark.
    """
    field = "content" if "content" in message else "value"
    answer = role_of(message.get("role", message.get("from"))) == "assistant"
    for names, kind, marks in _OWN:
        for name in names:
            own = message.get(name)
            if not own or not isinstance(message.get(field), str):
                continue
            marked = any(mark in message[field] for mark in marks)
            if answer and not marked:
                continue
            rest = {key: value for key, value in message.items() if key != name}
            if kind in repeated:
                message = rest
                continue
            found = as_list(own)
            media[kind] += found
            message = rest | {field: ("" if marked else marks[0] * len(found)) + message[field]}
    return message


def _kind(part: dict[str, Any]) -> Any:
    """A part's type; DashScope's parts have none, and their only field says it."""
    named = [name for name in ("text", "image", "video") if part.get(name) is not None]
    return named[0] if "type" not in part and len(named) == 1 else part.get("type")


def _inside(part: dict[str, Any], field: str) -> Any:
    """What a part holds under a name of another project: Anthropic's `source` (base64, or a URL),
    transformers' `base64`; None: it only marks a place. SampleError for a name that is not known.
    """
    source = part.get(_SOURCE)
    held = source if isinstance(source, dict) else {"data": part.get(_BASE64)}
    if held.get("url"):
        return held["url"]
    if data := held.get("data"):
        is_url = str(data).startswith("data:")
        return data if is_url else f"data:{held.get('media_type', '')};base64,{data}"
    for name, value in part.items():
        if name not in _KNOWN and _may_be_medium(value):
            detail = f"{field}: {name}: not where a part has its medium: {', '.join(_PLACES)}"
            raise SampleError("bad_schema", detail)
    return None


def _may_be_medium(value: Any) -> bool:
    """Whether a value is a medium's bytes or base64, or has them; options, descriptions in any
    script, and how long a cache keeps a part are not."""
    if isinstance(value, dict):
        return any(map(_may_be_medium, value.values()))
    if isinstance(value, str):
        start = value[:_LONG]
        return len(value) > _LONG and start.isascii() and not any(map(str.isspace, start))
    return isinstance(value, bytes) and bool(value)


def _part(part: Any, field: str, media: dict[str, list[Any]]) -> str:
    if isinstance(part, str):
        return part
    kind = _kind(part) if isinstance(part, dict) else None
    if kind in _TEXTS and isinstance(part.get("text"), str):
        if any(part.get(place) for place in _PLACES):
            detail = f"{field}: {part!r:.80}: a text that names a medium: make two parts of it"
            raise SampleError("bad_schema", detail)
        return str(part["text"])
    if kind not in _MARKS:
        raise SampleError("bad_schema", f"{field}: {part!r:.80}: a part is a text, image or video")
    medium = next((part[place] for place in _PLACES if part.get(place)), None)
    if medium is None:
        medium = _inside(part, field)
    if medium is not None:
        if isinstance(medium, bytes):
            medium = {"bytes": medium, "path": part.get("path")}
        elif isinstance(medium, dict) and isinstance(medium.get("url"), str):
            medium = medium["url"]
        more = {name: value for name, value in part.items() if name not in _KNOWN}
        if any(value is not None for value in more.values()):  # told as unused, with its name
            own = medium if isinstance(medium, dict) else {"path": medium}
            medium = own | more
        media["images" if _MARKS[kind] == IMAGE_MARK else "videos"].append(medium)
    return _MARKS[kind]
