"""Which fields a client's objects may have: read, taken without effect, or refused by name.

docs/serving.md has these tables for users; a test holds it to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from inference.serve.limits import Refused

Neutral = tuple[tuple[Any, ...], str]


@dataclass(frozen=True)
class Fields:
    """Of one kind of object. A field that is null counts as left out, whatever its name.

    Attributes:
        read: the server follows them.
        harmless: taken: they change no answer here.
        neutral: name -> (values that ask for nothing, why others are refused).
    """

    read: tuple[str, ...]
    harmless: tuple[str, ...] = ()
    neutral: Mapping[str, Neutral] = field(default_factory=dict)

    def check(self, given: Mapping[str, Any], where: str = "") -> None:
        """Raises Refused for a field that is unknown, or asks for what is not done.

        where: what `given` is of the request, `messages[0].`
        """
        for name, value in given.items():
            short = name[:60].encode("utf-8", "replace").decode()  # JSON has half characters
            path = where + short
            if value is None or name in self.read or name in self.harmless:
                continue
            if name not in self.neutral:
                raise Refused("unknown_field", f"{path}: {self._hint(short)}", path)
            values, why = self.neutral[name]
            if not any(value == one and type(value) is type(one) for one in _numbers(values)):
                allowed = f" (taken: {', '.join(map(repr, values))})" if values else ""
                words = f"{path}: {value!r:.60} is not supported: {why}{allowed}"
                raise Refused("unsupported", words, path)

    def _hint(self, name: str) -> str:
        near = get_close_matches(name, [*self.read, *self.neutral, *self.harmless], 1)
        if near:
            return f"is not a field here: did you mean {near[0]}?"
        known = [*self.read, *self.harmless]
        few = f"known are {', '.join(known)}" if len(known) < 16 else "docs/serving.md lists them"
        return f"is not a field here: {few}"


def _numbers(values: tuple[Any, ...]) -> list[Any]:
    """0 and 0.0 are one value in JSON; true is not 1."""
    both = [float(v) for v in values if type(v) is int]
    return [*values, *both]


_NO_TOOLS = "this model has no tools"
_GREEDY = "the engine samples by temperature, top_k, top_p and repetition_penalty alone"
_FREE = "the answer is text"
_SCHEMA = "use response_format"
_ONE_TILE = "every picture is seen as one tile of the model's size"

REQUEST = Fields(
    read=(
        "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
        "repetition_penalty", "silence_bias", "seed", "stop", "ignore_eos",
        "include_stop_str_in_output", "stream", "stream_options", "continue_final_message",
        "add_generation_prompt", "mm_processor_kwargs", "media_io_kwargs", "tools", "tool_choice",
        "n", "logprobs", "top_logprobs", "response_format",
    ),
    harmless=(
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "prediction", "parallel_tool_calls", "request_id", "priority",
        "cache_salt",
    ),
    neutral={
        "best_of": ((1,), "one answer a request"),
        "use_beam_search": ((False,), _GREEDY),
        "prompt_logprobs": ((0,), "no log-probabilities of prompts"),
        "functions": (([],), _NO_TOOLS),
        "function_call": (("none", "auto"), _NO_TOOLS),
        "logit_bias": (({},), _GREEDY),
        "frequency_penalty": ((0,), "use repetition_penalty"),
        "presence_penalty": ((0,), "use repetition_penalty"),
        "length_penalty": ((1,), _GREEDY),
        "stop_token_ids": (([],), "the answer is text: use stop"),
        "min_p": ((0,), _GREEDY),
        "min_tokens": ((0,), "the model ends its answer; ignore_eos goes on to max_tokens"),
        "bad_words": (([],), _GREEDY),
        "allowed_token_ids": (([],), _GREEDY),
        "modalities": ((["text"],), _FREE),
        "verbosity": (("medium",), _FREE),
        "reasoning_effort": (("none",), "the model does not reason before it answers"),
        "echo": ((False,), "the answer is what is new"),
        "skip_special_tokens": ((True,), "answers are text"),
        "spaces_between_special_tokens": ((True, False), ""),
        "return_token_ids": ((False,), "answers are text"),
        "return_tokens_as_token_ids": ((False,), "answers are text"),
        "add_special_tokens": ((False,), "prompts are written as in training"),
        "chat_template_kwargs": (({},), "prompts are written as in training"),
        "documents": (([],), "prompts are written as in training"),
        "chat_template": ((), "prompts are written as in training"),
        "extra_body": ((), "its fields belong into the request itself"),
        **{f"guided_{name}": ((), _SCHEMA) for name in ("choice", "json", "regex", "grammar")},
        "structured_outputs": ((), _SCHEMA),
    },
)  # fmt: skip

STREAM_OPTIONS = Fields(
    read=("include_usage",),
    harmless=("include_obfuscation",),
    neutral={"continuous_usage_stats": ((False,), "the last piece has the counts")},
)
RESPONSE_FORMAT = Fields(read=("type", "json_schema"))
JSON_SCHEMA = Fields(read=("schema",), harmless=("name", "description", "strict"))

_MESSAGE: dict[str, Neutral] = {
    "tool_calls": (([],), _NO_TOOLS),
    "function_call": ((), _NO_TOOLS),
    "audio": ((), "the model hears nothing"),
}
MESSAGE = Fields(read=("role", "content", "name"), neutral=_MESSAGE)
ANSWER = Fields(  # what a server has said before, as clients send it back
    read=("role", "content", "name", "refusal"),
    harmless=("annotations", "reasoning", "reasoning_content"),
    neutral=_MESSAGE,
)

FRAMES = ("fps", "min_frames", "max_frames", "num_frames")
_SIZES = ("min_pixels", "max_pixels", "total_pixels")
_PIXELS: dict[str, Neutral] = {name: ((), _ONE_TILE) for name in _SIZES}
TEXT_PART = Fields(read=("type", "text"))
REFUSAL_PART = Fields(read=("type", "refusal"))
IMAGE_PART = Fields(read=("type", "image_url"), harmless=("uuid",), neutral=_PIXELS)
IMAGE_URL = Fields(read=("url",), neutral={"detail": (("auto",), _ONE_TILE), **_PIXELS})
VIDEO_PART = Fields(read=("type", "video_url", *FRAMES), harmless=("uuid",), neutral=_PIXELS)
VIDEO_URL = Fields(read=("url", *FRAMES), neutral={"detail": (("auto",), _ONE_TILE), **_PIXELS})
# `mm_processor_kwargs`, and `video` of `media_io_kwargs`: of every video that does not say itself.
PROCESSOR = Fields(read=FRAMES, neutral={"do_sample_frames": ((True,), ""), **_PIXELS})
MEDIA_IO = Fields(read=("video",), neutral={"image": (({},), "pictures are read as they are")})

# The messages of a WebSocket, by their type. `event_id` is a client's own number of a message.
_EVENT = ("type", "event_id")
SESSION = Fields(
    read=(
        "instructions", "prompt", "source", "pace", "frame_interval", "max_output_tokens",
        "temperature", "top_k", "top_p", "repetition_penalty", "silence_bias", "seed",
    ),
)  # fmt: skip
ITEM = Fields(read=("type", "role", "content"), harmless=("id", "object", "status"))
INPUT_TEXT = Fields(read=("type", "text"))
INPUT_IMAGE = Fields(read=("type", "image_url"), neutral={"detail": (("auto",), _ONE_TILE)})
EVENTS = {
    "session.update": Fields(read=("session",), harmless=_EVENT),
    "input_image_buffer.append": Fields(read=("image", "ts", "prompt"), harmless=_EVENT),
    "input_image_buffer.end": Fields(read=(), harmless=_EVENT),
    "conversation.item.create": Fields(read=("item",), harmless=_EVENT),
    "response.cancel": Fields(read=(), harmless=_EVENT),
    "session.close": Fields(read=(), harmless=_EVENT),
}
