"""What a client may send in a session: the messages of the WebSocket, by their type.

Names are those of OpenAI's Realtime API where it has them. `event_id` is a client's own number of
a message.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from inference.serve.limits import SAMPLING_RANGES
from inference.serve.requests import DETAILS, Url, branch
from inference.serve.typed_fields import Chars, Choice, Fields, Range, harmless, neutral


class Session(Fields):
    """Changes; what is left out or null stays as it is (`pace` null: no limit)."""

    nullable: ClassVar = ("pace",)

    instructions: Annotated[str | None, Chars()] = None
    prompt: Annotated[str | None, Chars()] = None
    source: Annotated[str | None, Choice({"live": "live", "file": "file"})] = None
    pace: Annotated[int, Range(1, 1000, whole=True)] | None = None
    frame_interval: Annotated[float | None, Range(0.01, 3600)] = None
    max_output_tokens: Annotated[int | None, Range(1, 10**6, whole=True, endless="inf")] = None
    temperature: Annotated[float | None, Range(*SAMPLING_RANGES["temperature"])] = None
    top_k: Annotated[int | None, Range(*SAMPLING_RANGES["top_k"], whole=True)] = None
    top_p: Annotated[float | None, Range(*SAMPLING_RANGES["top_p"])] = None
    min_p: Annotated[float | None, Range(*SAMPLING_RANGES["min_p"])] = None
    repetition_penalty: Annotated[float | None, Range(*SAMPLING_RANGES["repetition_penalty"])] = (
        None
    )
    silence_bias: Annotated[float | None, Range(*SAMPLING_RANGES["silence_bias"])] = None
    seed: Annotated[int | None, Range(*SAMPLING_RANGES["seed"], whole=True)] = None
    model: str | None = None
    type: Any = neutral("only sessions that watch", "realtime")
    output_modalities: Any = neutral("it says text", ["text"])
    tools: Any = neutral("a session calls no tools", [])
    tool_choice: Any = neutral("a session calls no tools", "none", "auto")


class TextInput(Fields):
    type: Annotated[str, Choice({"input_text": "input_text"})]
    text: Annotated[str, Chars()] = ""


class ImageInput(Fields):
    type: Annotated[str, Choice({"input_image": "input_image"})]
    image_url: Url = None
    detail: Annotated[str, Choice(DETAILS)] = "auto"


_Part = Annotated[
    Annotated[TextInput, Tag("<input_text>")] | Annotated[ImageInput, Tag("<input_image>")],
    Discriminator(
        branch,
        custom_error_type="wrong_part",
        custom_error_message="expected input_text or input_image",
    ),
]


class Item(Fields):
    """A user's text with at most one picture."""

    type: Annotated[str, Choice({"message": "message"})] = "message"
    role: Annotated[str, Choice({"user": "user"}, "user: nobody else writes items")] = "user"
    content: Annotated[
        Annotated[str, Chars(), Tag("<text>")]
        | Annotated[list[_Part], Field(min_length=1), Tag("<parts>")],
        Discriminator(
            branch,
            custom_error_type="wrong_content",
            custom_error_message="expected a text or a list of parts",
        ),
    ]
    id: Any = harmless()
    object: Any = harmless()
    status: Any = harmless()


class Event(Fields):
    type: str
    event_id: Any = harmless()


class SessionUpdate(Event):
    session: Session


class ImageAppend(Event):
    """A frame; without `image`: second and prompt of the binary message that follows."""

    image: Url = None
    ts: Annotated[float | None, Range(0, 1e9)] = None
    prompt: Annotated[str | None, Chars()] = None


class ImageEnd(Event):
    """No more input."""


class CreateItem(Event):
    item: Item


class CreateResponse(Event):
    """Changes nothing: what is asked is answered at once."""

    response: Any = neutral("use session.update", {}, {"output_modalities": ["text"]})


class Cancel(Event):
    """Ends the response that is being said, or only the one of this name."""

    response_id: str | None = None


class Close(Event):
    """Ends the session."""


EVENTS: dict[str, type[Event]] = {
    "session.update": SessionUpdate,
    "input_image_buffer.append": ImageAppend,
    "input_image_buffer.end": ImageEnd,
    "conversation.item.create": CreateItem,
    "response.create": CreateResponse,
    "response.cancel": Cancel,
    "session.close": Close,
}
