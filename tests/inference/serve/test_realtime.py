"""`/v1/realtime` through OpenAI's own client: events are read as its types."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import realtime as types

from inference.engine.load import load_engine
from tests.inference.serve.serving import Running, data_url, jpeg, serving

BETWEEN = ("input_frame.processed", "session.metrics", "session.usage")  # events of ours
OPENING = (
    types.ResponseOutputItemAddedEvent,
    types.ConversationItemAdded,
    types.ResponseContentPartAddedEvent,
)
CLOSING = (
    types.ResponseContentPartDoneEvent,
    types.ConversationItemDone,
    types.ResponseOutputItemDoneEvent,
    types.ResponseDoneEvent,
)


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    engine = load_engine(tiny, device="cpu", window=8, max_tokens=256, max_sessions=2)
    with serving(engine) as running:
        yield running


def until(connection: Any, kind: str) -> Any:
    """The next event of a type; each one on the way has what OpenAI's API gives it."""
    for event in connection:
        assert event.event_id
        if event.type == kind:
            return event
        assert event.type != "error", event
    raise AssertionError(f"no {kind}")


def whole(model: type[Any], event: Any) -> Any:
    """The event, checked as strictly as its type is written."""
    return model.model_validate(event.to_dict())


def test_openais_client_watches_asks_and_cancels(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.http}/v1", api_key="none")
    with client.realtime.connect(model="moss-video") as connection:
        created = whole(types.SessionCreatedEvent, until(connection, "session.created"))
        assert (created.session.type, created.session.model) == ("realtime", "moss-video")
        update: Any = {"type": "realtime", "output_modalities": ["text"], "max_output_tokens": 9,
                       "instructions": "Be brief.", "tools": [], "silence_bias": -50,
                       "model": "moss-video"}  # fmt: skip
        connection.session.update(session=update)
        updated = whole(types.SessionUpdatedEvent, until(connection, "session.updated"))
        assert (updated.session.instructions, updated.session.max_output_tokens) == ("Be brief.", 9)
        frame: Any = {"type": "input_image_buffer.append", "ts": 1.0,
                      "image": base64.b64encode(jpeg()).decode()}  # fmt: skip
        connection.send(frame)
        assert until(connection, "input_frame.processed").frame_at == 1.0
        until(connection, "response.done")  # what it says to the frame alone
        content: Any = [
            {"type": "input_text", "text": "Who is it?"},
            {"type": "input_image", "image_url": data_url(jpeg(1), "image/jpeg")},
        ]
        connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": content}
        )
        connection.response.create()
        asked = whole(
            types.ConversationItemCreatedEvent, until(connection, "conversation.item.created")
        )
        assert asked.item.content[0].text == "Who is it?"
        for model in (types.ConversationItemAdded, types.ConversationItemDone):
            assert whole(model, next(iter(connection))).item == asked.item
        begun = whole(types.ResponseCreatedEvent, until(connection, "response.created"))
        assert begun.response.status == "in_progress"
        opened = [whole(model, next(iter(connection))) for model in OPENING]
        assert opened[0].item.id == opened[1].item.id == opened[2].item_id
        assert (opened[0].item.status, opened[2].part.text) == ("in_progress", "")
        said, names = "", []
        for event in connection:
            names.append(event.type)
            if event.type == "response.output_text.delta":
                said += whole(types.ResponseTextDeltaEvent, event).delta
                assert event.response_id == begun.response.id
            if event.type == "response.output_text.done":
                break
        assert set(names) <= {"response.output_text.delta", event.type, *BETWEEN}
        assert whole(types.ResponseTextDoneEvent, event).text == said
        closed = [whole(model, next(iter(connection))) for model in CLOSING]
        assert (closed[0].item_id, closed[0].part.text) == (opened[0].item.id, said)
        done = closed[-1].response
        assert (done.id, done.status) == (begun.response.id, "incomplete")
        assert done.status_details.reason == "max_output_tokens"
        assert closed[1].item == closed[2].item == done.output[0]
        assert (done.output[0].id, done.output[0].content[0].text) == (opened[0].item.id, said)
        assert done.usage.output_tokens == 9
        connection.response.cancel(response_id="another")
        error = whole(types.RealtimeErrorEvent, until(connection, "error")).error
        assert error.code == "nothing_to_cancel"
    for live in list(server.hub.sessions.values()):
        live.close("the test is over")
    server.wait(0)


def test_openais_client_names_the_model_and_asks_for_no_limit(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.http}/v1", api_key="none")
    with client.realtime.connect(model="moss-video") as connection:
        connection.session.update(session={"type": "transcription"})  # type: ignore[typeddict-item]
        error = whole(types.RealtimeErrorEvent, until(connection, "error")).error
        assert (error.type, error.param) == ("invalid_request_error", "session.type")
        connection.session.update(session={"type": "realtime", "model": "another"})
        error = whole(types.RealtimeErrorEvent, until(connection, "error")).error
        assert (error.code, error.param) == ("model_not_found", "session.model")
        connection.session.update(session={"type": "realtime", "max_output_tokens": "inf"})
        updated = whole(types.SessionUpdatedEvent, until(connection, "session.updated"))
        assert updated.session.max_output_tokens == "inf"
        (live,) = (one for one in list(server.hub.sessions.values()) if one.socket)
        assert live.handle.config.max_new_tokens is None
        connection.send({"type": "session.close"})  # type: ignore[arg-type,typeddict-item]
        until(connection, "session.closed")
    server.wait(0)
