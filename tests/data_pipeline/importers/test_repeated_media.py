"""A medium that a record and its messages name, each in its own spelling, is one medium."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.importers.conversation import conversation_draft
from data_pipeline.schema import SampleError

IMAGE = {"type": "image", "image": "a.jpg"}
OTHER = {"type": "image", "image": "b.jpg"}
VIDEO = {"type": "video", "video": "a.mp4"}


def asked(content: Any, own: dict[str, Any] | None = None, **record: Any) -> dict[str, Any]:
    """own: further fields of the question."""
    question = {"role": "user", "content": content} | (own or {})
    return {"messages": [question, {"role": "assistant", "content": "Red."}], **record}


SAME = [
    (asked([VIDEO, "?"], videos="a.mp4"), ["a.mp4"]),
    (asked([IMAGE, "?"], images=[{"path": "a.jpg"}]), ["a.jpg"]),
    (asked([IMAGE, "?"], images=["./a.jpg"]), ["a.jpg"]),
    (asked([{"type": "image", "image": "file:///x/a.jpg"}, "?"], images=["a.jpg"]), ["/x/a.jpg"]),
    (asked([IMAGE, "?"], image="a.jpg"), ["a.jpg"]),
    (asked([IMAGE, "?"], images=[{"bytes": b"its bytes", "path": "a.jpg"}]), [b"its bytes"]),
    (asked("?", {"image": "a.jpg"}, image="a.jpg"), ["a.jpg"]),
    (asked("?", {"images": ["a.jpg"]}, images=["a.jpg"]), ["a.jpg"]),
    (asked("<video>?", {"video": "a.mp4"}, video="a.mp4"), ["a.mp4"]),
    (asked("<image><image>?", {"image": "b.jpg"}, images=["a.jpg", "b.jpg"]), ["a.jpg", "b.jpg"]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "media"), SAME)
def test_a_medium_that_is_named_twice_is_taken_once(
    record: dict[str, Any], media: list[Any]
) -> None:
    draft = conversation_draft(record, "")
    assert [medium.content for medium in draft.media] == media
    assert draft.messages[1]["content"] == "Red."


def test_a_part_keeps_the_span_that_the_records_list_gives_its_video() -> None:
    listed = [{"video": "./a.mp4", "video_start": 1, "video_end": 3.5}]
    (clip,) = conversation_draft(asked([VIDEO, "?"], videos=listed), "").media
    assert clip.part == (1, 3.5)


def test_an_answer_gets_no_mark_for_a_medium_beside_it() -> None:
    record = asked("?", {"image": "a.jpg"}, image="a.jpg")
    record["messages"][1]["image"] = "a.jpg"
    draft = conversation_draft(record, "")
    assert draft.messages[1]["content"] == "Red."
    assert "unused field messages[].image" in draft.notes


@pytest.mark.parametrize(
    "record",
    [
        asked([IMAGE, "?"], images=["b.jpg"]),
        asked([IMAGE, "?"], images=["x/a.jpg"]),
        asked([IMAGE, OTHER, "?"], images=["b.jpg", "a.jpg"]),
        asked("?", {"image": "a.jpg"}, image="b.jpg"),
        asked("<image><image>", {"images": ["a.jpg", "b.jpg"]}, images=["b.jpg", "a.jpg"]),
    ],
)
def test_different_media_are_refused(record: dict[str, Any]) -> None:
    with pytest.raises(SampleError, match="different media"):
        conversation_draft(record, "")
