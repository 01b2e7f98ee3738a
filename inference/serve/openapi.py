"""`/openapi.json`: the routes, what they take and what they answer, made from the types that check
requests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from inference.serve.hub import MODEL
from inference.serve.messages import EVENTS
from inference.serve.replies import Chunk, Completion, Error, Health, Models
from inference.serve.replies import ModelCard as Card
from inference.serve.requests import ChatRequest

_REF = "#/components/schemas/{model}"
_WRONG = {  # statuses of errors, beside 401 where there is a key
    400: "a field is wrong; `param` names it",
    403: "another host's or site's request",
    404: "no such model or route",
    408: "the request did not come in time",
    413: "too large",
    415: "not application/json",
    429: "a limit of this key: `Retry-After` says when to ask again",
    500: "the server failed",
    503: "no room: try again",
}


@cache
def document() -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    replies = (Chunk, Completion, Error, Health, Models, Card)
    types = [(model, "validation") for model in (ChatRequest, *replies, *EVENTS.values())]
    _, schemas = models_json_schema(types, ref_template=_REF)  # type: ignore[arg-type]
    messages = {name: _ref(model.__name__) for name, model in EVENTS.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "MOSS-Video", "version": "1"},
        "paths": _paths(),
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # OpenAPI has no WebSockets; docs/serving.md has the events that come back.
        "x-websockets": {"/v1/realtime": {"query": ["session", "last_seq"], "messages": messages}},
    }


def _paths() -> dict[str, Any]:
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    named = {**_get("a model", _json("ModelCard"), 401, 403, 404), "parameters": [name]}
    return {
        "/": {"get": _get("the page", {"text/html": {}}, 403)},
        "/health": {"get": _get("whether the engine answers", _json("Health"), 403, busy="Health")},
        "/metrics": {"get": _get("for Prometheus", {"text/plain": {}}, 401, 403)},
        "/openapi.json": {"get": _get("this document", {"application/json": {}}, 403)},
        "/v1/models": {"get": _get("the models", _json("Models"), 401, 403)},
        "/v1/models/{model}": {"get": named},
        "/v1/chat/completions": {"post": _chat()},
    }


def _chat() -> dict[str, Any]:
    answers = {**_json("Completion"), "text/event-stream": {"schema": _ref("Chunk")}}
    example = {"model": MODEL, "messages": [{"role": "user", "content": "What is a ring?"}]}
    return {
        **_get("answers, whole or in pieces", answers, 401, *_WRONG),
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("ChatRequest"), "example": example}},
        },
    }


def _get(summary: str, answer: Mapping[str, Any], *wrong: int, busy: str = "") -> dict[str, Any]:
    words = {401: "a wrong or no API key", **_WRONG}
    responses: dict[str, Any] = {"200": {"description": "done", "content": answer}}
    for status in wrong:
        responses[str(status)] = {"description": words[status], "content": _json("Error")}
    if busy:
        responses["503"] = {"description": "it does not", "content": _json(busy)}
    key: dict[str, Any] = {"security": [{"key": []}, {}]} if 401 in wrong else {}
    return {"summary": summary, "responses": responses, **key}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}
