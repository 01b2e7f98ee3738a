"""docs/serving.md lists the fields that a client may send, as the server checks them."""

from __future__ import annotations

import json

from inference.serve import messages, requests
from inference.serve.typed_fields import Fields, kind
from tests.conftest import REPO

TABLE: list[tuple[str, type[Fields]]] = [
    ("the request", requests.ChatRequest),
    ("`stream_options`", requests.StreamOptions),
    ("`response_format`", requests.ResponseFormat),
    ("its `json_schema`", requests.JsonSchema),
    ("`tools`", requests.Tool),
    ("their `function`", requests.Function),
    ("a message", requests.Message),
    ("an assistant's", requests.Answer),
    ("its `tool_calls`", requests.ToolCall),
    ("their `function`", requests.CalledFunction),
    ("a tool's", requests.ToolResult),
    ("part `text`", requests.TextPart),
    ("part `refusal`", requests.RefusalPart),
    ("part `image_url`", requests.ImagePart),
    ("its `image_url`", requests.ImageUrl),
    ("part `video_url`", requests.VideoPart),
    ("its `video_url`", requests.VideoUrl),
    ("`mm_processor_kwargs`, `media_io_kwargs.video`", requests.Processor),
    ("`media_io_kwargs`", requests.MediaIO),
    *((f"event `{name}`", model) for name, model in messages.EVENTS.items()),
    ("`session` of `session.update`", messages.Session),
    ("`item` of `conversation.item.create`", messages.Item),
    ("its part `input_text`", messages.TextInput),
    ("its part `input_image`", messages.ImageInput),
]


def cell(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def row(title: str, model: type[Fields]) -> str:
    kinds = {name: kind(model, name) for name in model.names()}
    read, harmless = ([n for n, (k, _) in kinds.items() if k == one] for one in ("read", "none"))
    refused = {name: values for name, (k, values) in kinds.items() if k == "refused"}
    neutral = [
        f"`{name}` {' or '.join(map(json.dumps, values))}"
        for name, values in refused.items()
        if values
    ]
    never = [name for name, values in refused.items() if not values]
    cells = (title, cell(read), cell(harmless), ", ".join(neutral), cell(never))
    return f"| {' | '.join(cells)} |"


def test_the_page_has_the_servers_fields() -> None:
    head = "| of | read | taken, changes nothing | taken with this value alone | refused |"
    table = "\n".join([head, "|---|---|---|---|---|", *(row(*entry) for entry in TABLE)])
    assert table in (REPO / "docs" / "serving.md").read_text(), f"write there:\n{table}"
