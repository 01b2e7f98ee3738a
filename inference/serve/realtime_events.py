"""An event as a socket sends it: our flat fields, beside them those of OpenAI's Realtime API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inference.session.events import Event

# Our reason of an end -> OpenAI's, where it has one.
_REASONS = {
    "client_cancelled": "client_cancelled",
    "interrupted": "turn_detected",
    "max_new_tokens": "max_output_tokens",
}
_OURS = ("failed", "engine_error", "events_lost")  # codes of errors that are no fault of the client


def as_message(event: Event) -> dict[str, Any]:
    """An event as a JSON message. Events that OpenAI's API does not have get `event_id` alone."""
    message = event.as_dict()
    add = _MORE.get(event.type)
    more = add(message) if add else {}
    return {**message, "event_id": f"event_{event.seq}", **more}


def as_messages(event: Event) -> list[dict[str, Any]]:
    """An event's messages for a client of OpenAI's API: also those by which that API tells how an
    item and its text begin and end. They have no `seq`: they repeat what our message says, which
    may be asked for again."""
    message = as_message(event)
    before, after = _around(message)
    messages = [*before, message, *after]
    for number, one in enumerate(messages):
        if one is not message:
            one["event_id"] = f"event_{event.seq}_{number}"
    return messages


def _around(message: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What OpenAI's API tells before an event of ours, and after it."""
    kind = message["type"]
    if kind == "conversation.item.created":
        names = ("conversation.item.added", "conversation.item.done")
        about = {"item": message["item"], "previous_item_id": None}
        return [], [{"type": name, **about} for name in names]
    if kind not in ("response.created", "response.done"):
        return [], []
    name = message["response_id"]
    of_item = {"response_id": name, "output_index": 0}
    of_part = {**of_item, "item_id": _item_of(name), "content_index": 0}
    if kind == "response.created":
        item = _message(_item_of(name), "assistant", "in_progress", [])
        return [], [
            {"type": "response.output_item.added", **of_item, "item": item},
            {"type": "conversation.item.added", "item": item, "previous_item_id": None},
            {"type": "response.content_part.added", **of_part, "part": _part("")},
        ]
    (item,) = message["response"]["output"]
    text = message["text"]
    return [
        {"type": "response.output_text.done", **of_part, "text": text},
        {"type": "response.content_part.done", **of_part, "part": _part(text)},
        {"type": "conversation.item.done", "item": item, "previous_item_id": None},
        {"type": "response.output_item.done", **of_item, "item": item},
    ], []


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _session(message: dict[str, Any]) -> dict[str, Any]:
    session = message["session"]
    kinds = {"type": "realtime", "object": "realtime.session", "output_modalities": ["text"]}
    # OpenAI's `prompt` is the name of a stored one: null where ours is empty.
    most = session.get("max_output_tokens")
    limits = {"max_output_tokens": "inf" if most is None else most}
    return {"session": {**session, **kinds, **limits, "prompt": session.get("prompt") or None}}


def _item(message: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "input_text", "text": message["text"]}]
    item = _message(f"item_{message['seq']}", "user", "completed", content)
    return {"item": item, "previous_item_id": None}


def _created(message: dict[str, Any]) -> dict[str, Any]:
    return {"response": _response(message["response_id"], "in_progress", [])}


def _delta(message: dict[str, Any]) -> dict[str, Any]:
    return {"item_id": _item_of(message["response_id"]), "output_index": 0, "content_index": 0}


def _done(message: dict[str, Any]) -> dict[str, Any]:
    name, status = message["response_id"], message["status"]
    content = [{"type": "output_text", "text": message["text"]}]
    whole = "completed" if status == "completed" else "incomplete"
    response = _response(name, status, [_message(_item_of(name), "assistant", whole, content)])
    details: dict[str, Any] = {"type": status}
    if message["reason"] in _REASONS:
        details["reason"] = _REASONS[message["reason"]]
    usage = {"output_tokens": message["usage"]["output_tokens"]}
    return {"response": {**response, "status_details": details, "usage": usage}}


def _error(message: dict[str, Any]) -> dict[str, Any]:
    kind = "server_error" if message["code"] in _OURS else "invalid_request_error"
    words = {"code": message["code"], "message": message["message"]}
    return {"error": {"type": kind, **words, "param": message.get("field")}}


_MORE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "session.created": _session,
    "session.updated": _session,
    "conversation.item.created": _item,
    "response.created": _created,
    "response.output_text.delta": _delta,
    "response.done": _done,
    "error": _error,
}


def _response(name: str, status: str, output: list[Any]) -> dict[str, Any]:
    head = {"id": name, "object": "realtime.response", "status": status}
    return {**head, "output": output, "output_modalities": ["text"]}


def _message(name: str, role: str, status: str, content: list[Any]) -> dict[str, Any]:
    head = {"id": name, "object": "realtime.item", "type": "message"}
    return {**head, "role": role, "status": status, "content": content}


def _item_of(response: str) -> str:
    return f"item_{response}"
