"""How records of others mark the place of a medium in a text, to `<|image|>` and `<|video|>`.

`<image>` and `<video>` (LLaVA, LLaMA-Factory), `<img>PATH</img>` (Qwen-VL, ms-swift), marks with
numbers (`<image_00>` of MiniCPM-V, `<image 1>`, `<|image_1|>`), `<ImageHere>` (InternLM-XComposer),
`<|vision_start|><|image_pad|><|vision_end|>` (Qwen2-VL). In an answer only `<image>` and `<video>`
are marks: the others are part of what is learned.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from data_pipeline import files
from data_pipeline.importers.draft import Turn, media_type, medium_name
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, MediaType, SampleError

_OURS: dict[MediaType, str] = {"image": IMAGE_MARK, "video": VIDEO_MARK}
_PLAIN: dict[MediaType, str] = {"image": "<image>", "video": "<video>"}
ANY_MARKS = (*_OURS.values(), *_PLAIN.values())
_SOUND = re.compile(r"<\|?audio(?:_?\d+|_pad)?\|?>", re.IGNORECASE)
_WITH_PATH = re.compile(r"<(img|image|video)>\s*([^<>\n]+?)\s*</\1>")
_MARK = re.compile("<image>|<video>")
_ELEMENT_OR_MARK = re.compile(f"{_WITH_PATH.pattern}|{_MARK.pattern}")
_NUMBERED = re.compile(r"<\|?(image|video)[ _]?(\d+)\|?>")
_OTHER = re.compile(
    r"(?:<\|vision_start\|>)?<\|(image|video)_pad\|>(?:<\|vision_end\|>)?|<(Image|Video)Here>"
)


def place_marks(
    messages: list[Turn],
    media: dict[MediaType, list[Any]],
    notes: list[str],
    unmarked: bool = False,
) -> list[Turn]:
    """The messages with our marks. SampleError for numbers that are not those of the media.

    media: of a record, as it names them; changed to the order of the marks, where the texts number
        or name them. notes: gets marks of a record that has no media, in which they stay text.
        unmarked: the media may do without marks; numbers of none of them speak of something else.
    """
    text = "\n".join(message["content"] for message in messages)
    if "<" not in text:
        return messages
    if sound := _SOUND.search(text):
        mark = re.sub(r"\d+", "N", sound[0])
        notes.append(f"{mark} in a text, which stays text: the model takes no sound")
    if "</" in text:
        messages = _with_paths(messages, media)
    if not any(media.values()):
        found = [*_PLAIN.values(), *(m[0] for m in _OTHER.finditer(text))]
        found += [re.sub(r"\d+", "N", match[0]) for match in _NUMBERED.finditer(text)]
        notes += [f"{m} in a record without media" for m in dict.fromkeys(found) if m in text
                  or "N" in m]  # fmt: skip
        return messages
    messages = _edited_questions(messages, lambda t: _OTHER.sub(_plain_mark, t))
    for kind, own in media.items():
        messages = _numbered(messages, kind, own, unmarked)
    return _our_marks(messages, bool(media["image"]))


def is_numbered(name: Any) -> bool:
    """Whether a name is a mark with a number, as MiniCPM-V's records name their pictures."""
    return isinstance(name, str) and _NUMBERED.fullmatch(name) is not None


def number_of(name: str) -> int:
    match = _NUMBERED.fullmatch(name)
    assert match is not None
    return int(match[2])


def _edited_questions(messages: list[Turn], edit: Callable[[str], str]) -> list[Turn]:
    return [
        m if m["role"] == "assistant" else m | {"content": edit(m["content"])} for m in messages
    ]


def _questions(messages: list[Turn]) -> str:
    return "\n".join(m["content"] for m in messages if m["role"] != "assistant")


def _plain_mark(match: re.Match[str]) -> str:
    kind: MediaType = "image" if "image" in match[0].lower() else "video"
    return _PLAIN[kind]


def _with_paths(messages: list[Turn], media: dict[MediaType, list[Any]]) -> list[Turn]:
    """The messages with marks in place of the paths in the questions, which are the media of a
    record that names none of them elsewhere."""
    if any(media.values()):
        for kind, own in media.items():
            messages = _with_own_paths(messages, kind, own)
        return messages

    def mark(match: re.Match[str]) -> str:
        path = match[2]
        if media_type(path) is None and not files.is_url(path) and not path.startswith("data:"):
            return match[0]
        media[_path_kind(match)].append(path)
        return _PLAIN[_path_kind(match)]

    return _edited_questions(messages, lambda text: _WITH_PATH.sub(mark, text))


def _with_own_paths(messages: list[Turn], kind: MediaType, own: list[Any]) -> list[Turn]:
    """The messages with marks in place of the paths of a record's own media, where all of them
    stand in the questions: the first of each is its place. Other paths are text."""
    questions = _questions(messages)
    outside = _WITH_PATH.sub("", questions)
    if not own or _PLAIN[kind] in outside or _OURS[kind] in outside:
        return messages
    mentioned = [match[2] for match in _WITH_PATH.finditer(questions) if _path_kind(match) == kind]
    names, paths = (list(map(medium_name, values)) for values in (own, mentioned))
    named = [v for v in own if isinstance(v, str) or (isinstance(v, dict) and not v.get("bytes"))]
    if not named and len(mentioned) == len(own) and not set(names) <= set(paths):
        names = paths  # whatever bytes were called, they are in the order of the paths
    order: list[int] = []

    def mark(match: re.Match[str]) -> str:
        path = medium_name(match[2])
        places = (i for i, name in enumerate(names) if name == path and i not in order)
        place = next(places, None) if _path_kind(match) == kind else None
        if place is None:
            return match[0]
        order.append(place)
        return _PLAIN[kind]

    marked = _edited_questions(messages, lambda text: _WITH_PATH.sub(mark, text))
    if len(order) < len(own):
        return messages
    own[:] = [own[place] for place in order]
    return marked


def _path_kind(match: re.Match[str]) -> MediaType:
    return "video" if match[1] == "video" else "image"


def _numbered(messages: list[Turn], kind: MediaType, own: list[Any], unmarked: bool) -> list[Turn]:
    """Marks of a kind with numbers, from 0 or 1 on: the first with each is the place of its medium,
    later ones speak of it."""
    text = _questions(messages)
    found = [int(match[2]) for match in _NUMBERED.finditer(text) if match[1] == kind]
    if not own or not found or _PLAIN[kind] in text or _OURS[kind] in text:
        return messages
    order = list(dict.fromkeys(found))
    first = min(order)
    if first > 1 or sorted(order) != list(range(first, first + len(own))):
        if unmarked and max(order) >= min(first, 1) + len(own):
            return messages
        raise SampleError(
            "mark_media_mismatch",
            f"{len(own)} {kind}s, marks with the numbers {', '.join(map(str, order))}",
        )
    own[:] = [own[number - first] for number in order]
    left = set(order)

    def mark(match: re.Match[str]) -> str:
        number = int(match[2])
        if match[1] != kind or number not in left:
            return match[0]
        left.remove(number)
        return _PLAIN[kind]

    return _edited_questions(messages, lambda text: _NUMBERED.sub(mark, text))


def _our_marks(messages: list[Turn], images: bool) -> list[Turn]:
    """The messages with our marks. LLaVA-Video marks a video by `<image>`, too; in an answer
    `<image>` that is closed by `</image>` is text."""
    marks = {_PLAIN[kind]: ours for kind, ours in _OURS.items()}
    if not images and not any(
        mark in message["content"] for message in messages for mark in ("<video>", VIDEO_MARK)
    ):
        marks["<image>"] = VIDEO_MARK

    def edit(match: re.Match[str]) -> str:
        return marks.get(match[0], match[0])

    patterns = [_ELEMENT_OR_MARK if m["role"] == "assistant" else _MARK for m in messages]
    return [
        message | {"content": pattern.sub(edit, message["content"])}
        for message, pattern in zip(messages, patterns, strict=True)
    ]
