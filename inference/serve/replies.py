"""What the server answers, for `/openapi.json`: as OpenAI's API has it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorBody(_Reply):
    """param: the field that is wrong. code: a short word."""

    message: str
    type: str
    param: str | None
    code: str


class Error(_Reply):
    error: ErrorBody


class ModelCard(_Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(_Reply):
    object: Literal["list"]
    data: list[ModelCard]


class Likelihood(_Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLikelihood(Likelihood):
    top_logprobs: list[Likelihood]


class Logprobs(_Reply):
    content: list[TokenLikelihood]
    refusal: None


class Called(_Reply):
    name: str
    arguments: str


class Call(_Reply):
    id: str
    type: Literal["function"]
    function: Called


class CallPiece(Call):
    """index: of the call in its answer. It comes whole."""

    index: int


class AnswerMessage(_Reply):
    role: Literal["assistant"]
    content: str | None  # null beside calls alone
    refusal: None
    tool_calls: list[Call] | None = None


class Choice(_Reply):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Usage(_Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(_Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(_Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallPiece] | None = None


class ChunkChoice(_Reply):
    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class Chunk(_Reply):
    """An event of a stream; after the last one comes `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Health(_Reply):
    status: Literal["ok", "closing", "failed", "stuck", "no_replica"]
    step_seconds: float | None = None
    model: str
    stage: str | None
    prompt_form: Any
    tile: int | None  # pixels of the side of a picture as the model sees it
    weights: str  # a digest of the model's weights; empty: unknown
    sessions: int
    max_sessions: int
    memory_free: int | None = None  # bytes, on the model's device
    session_bytes: int | None = None  # what a session takes at most
    decoders: int | None = None  # processes that decode pictures of sessions
    replicas: int | None = None  # of a front, as the next two
    replicas_ready: int | None = None
    waiting: int | None = None
