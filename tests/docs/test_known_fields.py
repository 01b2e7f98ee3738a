"""docs/serving.md lists the fields that a client may send, as the server checks them."""

from __future__ import annotations

import json

from inference.serve import known_fields as fields
from inference.serve.known_fields import Fields
from tests.conftest import REPO

TABLE: list[tuple[str, Fields]] = [
    ("the request", fields.REQUEST),
    ("`stream_options`", fields.STREAM_OPTIONS),
    ("`response_format`", fields.RESPONSE_FORMAT),
    ("its `json_schema`", fields.JSON_SCHEMA),
    ("a message", fields.MESSAGE),
    ("an assistant's", fields.ANSWER),
    ("part `text`", fields.TEXT_PART),
    ("part `refusal`", fields.REFUSAL_PART),
    ("part `image_url`", fields.IMAGE_PART),
    ("its `image_url`", fields.IMAGE_URL),
    ("part `video_url`", fields.VIDEO_PART),
    ("its `video_url`", fields.VIDEO_URL),
    ("`mm_processor_kwargs`, `media_io_kwargs.video`", fields.PROCESSOR),
    ("`media_io_kwargs`", fields.MEDIA_IO),
    *((f"event `{name}`", fields.EVENTS[name]) for name in fields.EVENTS),
    ("`session` of `session.update`", fields.SESSION),
    ("`item` of `conversation.item.create`", fields.ITEM),
    ("its part `input_text`", fields.INPUT_TEXT),
    ("its part `input_image`", fields.INPUT_IMAGE),
]


def cell(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def row(title: str, known: Fields) -> str:
    neutral = [
        f"`{name}` {' or '.join(map(json.dumps, values))}".rstrip()
        for name, (values, _) in known.neutral.items()
        if values
    ]
    never = [f"`{name}`" for name, (values, _) in known.neutral.items() if not values]
    cells = (title, cell(known.read), cell(known.harmless), ", ".join(neutral), ", ".join(never))
    return f"| {' | '.join(cells)} |"


def test_the_page_has_the_servers_fields() -> None:
    head = "| of | read | taken, changes nothing | taken with this value alone | refused |"
    table = "\n".join([head, "|---|---|---|---|---|", *(row(*entry) for entry in TABLE)])
    assert table in (REPO / "docs" / "serving.md").read_text(), f"write there:\n{table}"
