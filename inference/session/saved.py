"""A session as plain data, and back: for `SessionHandle.save` and `Runner.restore`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from inference.engine.sampling import Sampling
from inference.session.response import Response, Vocabulary
from inference.session.session import Frame, Prompt, Session, SessionConfig, StepRequest
from inference.session.stats import Stats

_STATE_VERSION = 3
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


def state_of(session: Session) -> dict[str, Any]:
    """All that `resume` needs, between two steps: plain values and tensors."""
    response, unfinished = session.response, session._unfinished
    return {
        "version": _STATE_VERSION,
        "name": session.name,
        "config": asdict(session.config),
        "flags": {name: getattr(session, attribute) for name, attribute in _FLAGS.items()},
        "queued_tokens": list(session._queued_tokens),
        "response": response and (response.name, list(response.tokens)),
        "response_seconds": session._last_token_time - session._first_token_time,
        "frames": [(frame.image, frame.at, frame.prompt) for frame in session.frames],
        "prompts": [prompt.text for prompt in session.prompts],
        "unfinished": unfinished and _request(unfinished),
    }


def resume(
    state: Mapping[str, Any], vocabulary: Vocabulary, stats: Stats, now: float, most: int | None
) -> Session:
    """The session that `state_of` describes; its log and its measurements begin anew.

    most: as in Session. Raises ValueError for a state of another version of the program.
    """
    if state.get("version") != _STATE_VERSION:
        raise ValueError(
            f"a saved session of version {state.get('version', 1)}: this program reads version "
            f"{_STATE_VERSION}; save it again with this program"
        )
    given = {**state["config"], "sampling": Sampling(**state["config"]["sampling"])}
    session = Session(state["name"], SessionConfig(**given), vocabulary, stats, most=most)
    for name, attribute in _FLAGS.items():
        setattr(session, attribute, state["flags"][name])
    session._queued_tokens = list(state["queued_tokens"])
    if state["response"]:
        session._last_token_time = now
        session._first_token_time = now - state["response_seconds"]
        session.response = Response(vocabulary.tokenizer, state["response"][0])
        for token in state["response"][1]:
            session.response.append(token)
    for image, at, prompt in state["frames"]:
        session.frames.append(Frame(image, at, now, prompt))
    session.prompts.extend(Prompt(text, now) for text in state["prompts"])
    if state.get("unfinished"):
        tokens, image, at = state["unfinished"]
        frame = None if image is None else Frame(image, at, now)
        images = [] if image is None else [image]
        session._unfinished = StepRequest(list(tokens), images, began=now, frame=frame)
    return session


def _request(request: StepRequest) -> tuple[list[int], Any, float]:
    """Tokens, and picture and second of its frame, if it has one."""
    frame = request.frame
    return request.tokens, frame.image if frame else None, frame.at if frame else 0.0
