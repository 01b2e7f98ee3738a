"""A session as plain data, and back: for `SessionHandle.save` and `Runner.restore`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from inference.engine.sampling import Sampling
from inference.session.events import LOG_LIMIT
from inference.session.inputs import Frame, Prompt, StepRequest
from inference.session.response import Response, Vocabulary
from inference.session.session import Session, SessionConfig
from inference.session.stats import Stats

_STATE_VERSION = 4
_FLAGS = {  # name in a saved state -> attribute
    "media": "media",
    "started": "_started",
    "turn_over": "_turn_over",
    "tokens_since_frame": "_tokens_since_frame",
    "cancelled": "_cancelled",
    "input_ended": "_input_ended",
    "next_second": "next_second",
    "responses": "_responses",
}


def state_of(session: Session, *, pictures: bool = True) -> dict[str, Any]:
    """All that `resume` needs, between two steps: plain values and tensors; without `pictures` None
    in place of tensors."""
    response, unfinished = session.response, session._unfinished
    return {
        "version": _STATE_VERSION,
        "name": session.name,
        "config": asdict(session.config),
        "flags": {name: getattr(session, attribute) for name, attribute in _FLAGS.items()},
        "queued_tokens": list(session._queued_tokens),
        "response": response and (response.name, list(response.tokens)),
        "response_seconds": session._last_token_time - session._first_token_time,
        "frames": [_frame(frame, pictures) for frame in session.frames],
        "prompts": [prompt.text for prompt in session.prompts],
        "unfinished": unfinished and _request(unfinished, pictures),
        "asked": session._prompt_time is not None,
        "counts": dict(session.stats.counts),
        "seconds": session.stats.seconds,
    }


def resume(
    state: Mapping[str, Any],
    vocabulary: Vocabulary,
    stats: Stats,
    now: float,
    most: int | None,
    log_limit: int = LOG_LIMIT,
) -> Session:
    """The session that `state_of` describes; its log and its times begin anew, its
    counts go on.

    most: as in Session. Raises ValueError for a state of another version of the program.
    """
    if state.get("version") != _STATE_VERSION:
        raise ValueError(
            f"a saved session of version {state.get('version', 1)}: this program reads version "
            f"{_STATE_VERSION}; save it again with this program"
        )
    values = {**state["config"], "sampling": Sampling(**state["config"]["sampling"])}
    config = SessionConfig(**values)
    session = Session(state["name"], config, vocabulary, stats, log_limit, most)
    for name, attribute in _FLAGS.items():
        setattr(session, attribute, state["flags"][name])
    session._queued_tokens = list(state["queued_tokens"])
    if state["response"]:
        session._last_token_time = now
        session._first_token_time = now - state["response_seconds"]
        session.response = Response(vocabulary.tokenizer, state["response"][0])
        for token in state["response"][1]:
            session.response.append(token)
    for image, at, prompt, source in state["frames"]:
        session.frames.append(Frame(image, at, now, prompt, source))
    session.prompts.extend(Prompt(text, now) for text in state["prompts"])
    if state.get("unfinished"):
        tokens, stored_frame = state["unfinished"]
        image, at, _, source = stored_frame or (None, 0.0, None, 0)
        frame = None if image is None else Frame(image, at, now, source=source)
        images = [] if image is None else [image]
        session._unfinished = StepRequest(list(tokens), images, began=now, frame=frame)
    if state.get("asked"):  # a prompt is being taken in
        session._prompt_time = now
    stats.counts.update(state.get("counts", {}))
    stats.began = now - state.get("seconds", 0.0)
    return session


def _frame(frame: Frame, pictures: bool) -> tuple[Any, float, str | None, int]:
    return frame.image if pictures else None, frame.at, frame.prompt, frame.source


def _request(request: StepRequest, pictures: bool) -> tuple[list[int], Any]:
    """A request's tokens, and its frame, if it has one."""
    return list(request.tokens), request.frame and _frame(request.frame, pictures)
