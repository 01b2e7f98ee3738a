"""How records of others mark the place of a medium in a text, to `<|image|>` and `<|video|>`.

`<image>` and `<video>` (LLaVA, LLaMA-Factory), `<img>PATH</img>` (Qwen-VL, ms-swift), marks with
numbers (`<image_00>` of MiniCPM-V, `<image 1>`, `<|image_1|>`), `<ImageHere>` (InternLM-XComposer),
`<|vision_start|><|image_pad|><|vision_end|>` (Qwen2-VL).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from data_pipeline import files
from data_pipeline.importers.draft import Turn, media_type
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, MediaType, SampleError

_OURS: dict[MediaType, str] = {"image": IMAGE_MARK, "video": VIDEO_MARK}
_PLAIN: dict[MediaType, str] = {"image": "<image>", "video": "<video>"}
_WITH_PATH = re.compile(r"<(img|image|video)>\s*([^<>\n]+?)\s*</\1>")
_NUMBERED = re.compile(r"<\|?(image|video)[ _]?(\d+)\|?>")
_OTHER = re.compile(
    r"(?:<\|vision_start\|>)?<\|(image|video)_pad\|>(?:<\|vision_end\|>)?|<(Image|Video)Here>"
)


def place_marks(
    messages: list[Turn], media: dict[MediaType, list[Any]], notes: list[str]
) -> list[Turn]:
    """The messages with our marks. SampleError for numbers that are not those of the media.

    media: of a record, as it names them; changed to the order of the marks, where the texts number
        or name them. notes: gets marks of a record that has no media, in which they stay text.
    """
    text = "\n".join(message["content"] for message in messages)
    if "<" not in text:
        return messages
    if "</" in text:
        messages = _with_paths(messages, media)
    if not any(media.values()):
        found = [*_PLAIN.values(), *(m[0] for m in _OTHER.finditer(text))]
        found += [re.sub(r"\d+", "N", match[0]) for match in _NUMBERED.finditer(text)]
        notes += [f"{m} in a record without media" for m in dict.fromkeys(found) if m in text
                  or "N" in m]  # fmt: skip
        return messages
    messages = _edited(messages, lambda t: _OTHER.sub(_plain_mark, t))
    for kind, own in media.items():
        messages = _numbered(messages, kind, own)
    return _our_marks(messages, bool(media["image"]))


def is_numbered(name: Any) -> bool:
    """Whether a name is a mark with a number, as MiniCPM-V's records name their pictures."""
    return isinstance(name, str) and _NUMBERED.fullmatch(name) is not None


def number_of(name: str) -> int:
    match = _NUMBERED.fullmatch(name)
    assert match is not None
    return int(match[2])


def _edited(messages: list[Turn], edit: Callable[[str], str]) -> list[Turn]:
    return [message | {"content": edit(message["content"])} for message in messages]


def _plain_mark(match: re.Match[str]) -> str:
    kind: MediaType = "image" if "image" in match[0].lower() else "video"
    return _PLAIN[kind]


def _with_paths(messages: list[Turn], media: dict[MediaType, list[Any]]) -> list[Turn]:
    """With marks in place of the paths in the texts, which are the media of a record that names
    none of them elsewhere."""
    inside: dict[MediaType, list[Any]] = {"image": [], "video": []}

    def mark(match: re.Match[str]) -> str:
        kind: MediaType = "video" if match[1] == "video" else "image"
        path = match[2]
        if media_type(path) is None and not files.is_url(path) and not path.startswith("data:"):
            return match[0]
        inside[kind].append(path)
        return _PLAIN[kind]

    messages = _edited(messages, lambda text: _WITH_PATH.sub(mark, text))
    for kind, found in inside.items():
        media[kind] = media[kind] or found
    return messages


def _numbered(messages: list[Turn], kind: MediaType, own: list[Any]) -> list[Turn]:
    """Marks of a kind with numbers, from 0 or 1 on: the first with each is the place of its medium,
    later ones speak of it."""
    text = "\n".join(message["content"] for message in messages)
    found = [int(match[2]) for match in _NUMBERED.finditer(text) if match[1] == kind]
    if not own or not found or _PLAIN[kind] in text or _OURS[kind] in text:
        return messages
    order = list(dict.fromkeys(found))
    first = min(order)
    if first > 1 or sorted(order) != list(range(first, first + len(own))):
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

    return _edited(messages, lambda text: _NUMBERED.sub(mark, text))


def _our_marks(messages: list[Turn], images: bool) -> list[Turn]:
    """With our marks. LLaVA-Video marks a video by `<image>`, too."""
    marks = {_PLAIN[kind]: ours for kind, ours in _OURS.items()}
    if not images and not any(
        mark in message["content"] for message in messages for mark in ("<video>", VIDEO_MARK)
    ):
        marks["<image>"] = VIDEO_MARK

    def edit(text: str) -> str:
        for theirs, ours in marks.items():
            text = text.replace(theirs, ours)
        return text

    return _edited(messages, edit)
