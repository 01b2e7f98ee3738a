"""What a chat request may have: its fields, their types and ranges, and what is refused by name.

docs/serving.md has these tables for users, `/openapi.json` for programs; tests hold both to them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Strict, Tag, WithJsonSchema

from inference.engine.token_choice import MOST_LIKELY
from inference.serve.limits import SAMPLING_RANGES
from inference.serve.typed_fields import Biases, Choice, Fields, Range, harmless, neutral

_USE_TOOLS = "use tools"
_FUNCTION = {"function": "function"}
_SAMPLING = "the engine samples without it: docs/serving.md lists the fields that it takes"
_TEXT = "the answer is text"
_DIRECT = "the model does not reason before it answers"
_AS_TRAINED = "prompts are written as in training"
DETAILS = {name: name for name in ("auto", "low", "high", "original")}  # read, and not seen
ONE_TILE = "every picture is seen as one tile of the model's size"
_SCHEMA = "use response_format"

_FRAMES = Range(1, lambda limits: limits.frames, whole=True)
_TOKENS = Range(1, lambda limits: limits.max_tokens, whole=True)
_FEWEST = Range(0, lambda limits: limits.max_tokens, whole=True)
_LAST_TOKEN = 2**31 - 1  # what the model has is known later
Url = Annotated[Any, WithJsonSchema({"type": "string"})]  # read by data_urls.py, which may be long


class Frames(Fields):
    """Which frames of a video are shown."""

    fps: Annotated[float | None, Range(0.01, 1000)] = None
    min_frames: Annotated[int | None, _FRAMES] = None
    max_frames: Annotated[int | None, _FRAMES] = None
    num_frames: Annotated[int | None, _FRAMES] = None
    min_pixels: Any = neutral(ONE_TILE)
    max_pixels: Any = neutral(ONE_TILE)
    total_pixels: Any = neutral(ONE_TILE)

    @property
    def chosen(self) -> dict[str, Any]:
        """Fields of FrameChoice that are given."""
        names = ("fps", "min_frames", "max_frames", "num_frames")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class ImageUrl(Fields):
    url: Url = None
    detail: Annotated[str, Choice(DETAILS)] = "auto"
    min_pixels: Any = neutral(ONE_TILE)
    max_pixels: Any = neutral(ONE_TILE)
    total_pixels: Any = neutral(ONE_TILE)


class VideoUrl(Frames):
    url: Url = None
    detail: Annotated[str, Choice(DETAILS)] = "auto"


def _as_object(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class TextPart(Fields):
    type: Annotated[str, Choice({"text": "text"})]
    text: str = ""
    prompt_cache_breakpoint: Any = harmless()
    cache_control: Any = harmless()


class RefusalPart(Fields):
    type: Annotated[str, Choice({"refusal": "refusal"})]
    refusal: str = ""


class ImagePart(Fields):
    type: Annotated[str, Choice({"image_url": "image_url"})]
    image_url: Annotated[
        ImageUrl, BeforeValidator(_as_object, json_schema_input_type=ImageUrl | str)
    ]
    uuid: Any = harmless()
    prompt_cache_breakpoint: Any = harmless()
    cache_control: Any = harmless()
    min_pixels: Any = neutral(ONE_TILE)
    max_pixels: Any = neutral(ONE_TILE)
    total_pixels: Any = neutral(ONE_TILE)


class VideoPart(Frames):
    type: Annotated[str, Choice({"video_url": "video_url"})]
    video_url: Annotated[
        VideoUrl, BeforeValidator(_as_object, json_schema_input_type=VideoUrl | str)
    ]
    uuid: Any = harmless()
    prompt_cache_breakpoint: Any = harmless()
    cache_control: Any = harmless()


def branch(value: Any) -> str:
    """The tag of a content or a part in pydantic's tagged unions."""
    if isinstance(value, str | list):
        return "<text>" if isinstance(value, str) else "<parts>"
    tag = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{tag}>" if isinstance(tag, str) and tag.isascii() else "<none>"


_Text = Annotated[TextPart, Tag("<text>")]
_Image = Annotated[ImagePart, Tag("<image_url>")]
_Video = Annotated[VideoPart, Tag("<video_url>")]
_Refusal = Annotated[RefusalPart, Tag("<refusal>")]
_Whole = Annotated[str, Tag("<text>")]
_PARTS = Discriminator(
    branch,
    custom_error_type="wrong_part",
    custom_error_message="expected text, image_url or video_url",
)
_CONTENT = Discriminator(
    branch,
    custom_error_type="invalid_value",
    custom_error_message="expected a text or a list of parts",
)
Part = Annotated[_Text | _Image | _Video, _PARTS]
AnswerPart = Annotated[_Text | _Image | _Video | _Refusal, _PARTS]


class Turn(Fields):
    """A message. type: lm-eval writes one; metadata, options: Gradio; cache_control: Anthropic's
    clients."""

    name: str | None = None
    metadata: Any = harmless()
    options: Any = harmless()
    cache_control: Any = harmless()
    type: Any = neutral("a message has no type", "message", "text")
    function_call: Any = neutral(_USE_TOOLS)
    audio: Any = neutral("the model hears nothing")


class Message(Turn):
    """A system's or a user's."""

    role: Annotated[
        str,
        Choice({"system": "system", "developer": "system", "user": "user"}),
    ]
    content: Annotated[_Whole | Annotated[list[Part], Tag("<parts>")], _CONTENT]
    tool_calls: Any = neutral("only an assistant calls tools", [])


class ToolResult(Turn):
    """A tool's answer. The model reads it as a user's turn."""

    role: Annotated[str, Choice({"tool": "user"})]
    content: Annotated[_Whole | Annotated[list[Part], Tag("<parts>")], _CONTENT]
    tool_call_id: str


class CalledFunction(Fields):
    name: str
    arguments: str = "{}"


class ToolCall(Fields):
    id: str
    type: Annotated[str, Choice(_FUNCTION)] = "function"
    function: CalledFunction
    index: Any = harmless()
    provider_specific_fields: Any = harmless()


class Answer(Turn):
    """What a server has said before, as clients send it back. provider_specific_fields, and what
    a model has thought: LiteLLM and OpenRouter."""

    role: Annotated[str, Choice({"assistant": "assistant"})]
    content: Annotated[_Whole | Annotated[list[AnswerPart], Tag("<parts>")], _CONTENT] = ""
    refusal: str = ""
    tool_calls: Annotated[tuple[ToolCall, ...], Strict(False)] = ()
    annotations: Any = harmless()
    reasoning: Any = harmless()
    reasoning_content: Any = harmless()
    reasoning_details: Any = harmless()
    thinking_blocks: Any = harmless()
    provider_specific_fields: Any = harmless()


def _speaker(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    if role in ("assistant", "tool"):
        return "<answer>" if role == "assistant" else "<result>"
    return "<message>" if role in ("system", "developer", "user") else "<none>"


AnyMessage = Annotated[
    Annotated[Message, Tag("<message>")]
    | Annotated[Answer, Tag("<answer>")]
    | Annotated[ToolResult, Tag("<result>")],
    Discriminator(
        _speaker,
        custom_error_type="wrong_role",
        custom_error_message="expected system, user, assistant or tool",
    ),
]


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: Any = harmless()
    continuous_usage_stats: bool = False


class JsonSchema(Fields):
    schema_: dict[str, Any] = Field(alias="schema")
    name: Any = harmless()
    description: Any = harmless()
    strict: Any = harmless()


class ResponseFormat(Fields):
    type: Annotated[
        str, Choice({name: name for name in ("text", "json_object", "json_schema")})
    ] = "text"
    json_schema: JsonSchema | None = None


class Function(Fields):
    """parameters: a JSON Schema."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: Any = harmless()


class Tool(Fields):
    type: Annotated[str, Choice(_FUNCTION)]
    function: Function
    cache_control: Any = harmless()


class FunctionName(Fields):
    name: str


class NamedTool(Fields):
    type: Annotated[str, Choice(_FUNCTION)]
    function: FunctionName


_ToolWord = Annotated[
    str, Choice({name: name for name in ("none", "auto", "required")}), Tag("<text>")
]


class Processor(Frames):
    """`mm_processor_kwargs`, and `video` of `media_io_kwargs`: of videos that say nothing."""

    do_sample_frames: Any = neutral("", True)


class MediaIO(Fields):
    video: Processor = Processor()
    image: Any = neutral("pictures are read as they are", {})


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ChatRequest(Fields):
    """A request for `/v1/chat/completions`. A field that is null counts as left out."""

    model: Any = None
    messages: Annotated[list[AnyMessage], Field(min_length=1)]
    max_tokens: Annotated[int | None, _TOKENS] = None
    max_completion_tokens: Annotated[int | None, _TOKENS] = None
    temperature: Annotated[float | None, Range(*SAMPLING_RANGES["temperature"])] = None
    top_p: Annotated[float | None, Range(*SAMPLING_RANGES["top_p"])] = None
    top_k: Annotated[int | None, Range(*SAMPLING_RANGES["top_k"], whole=True)] = None
    min_p: Annotated[float | None, Range(*SAMPLING_RANGES["min_p"])] = None
    repetition_penalty: Annotated[float | None, Range(*SAMPLING_RANGES["repetition_penalty"])] = (
        None
    )
    presence_penalty: Annotated[float | None, Range(*SAMPLING_RANGES["presence_penalty"])] = None
    frequency_penalty: Annotated[float | None, Range(*SAMPLING_RANGES["frequency_penalty"])] = None
    logit_bias: Annotated[dict[int, float] | None, Biases(*SAMPLING_RANGES["logit_bias"])] = None
    silence_bias: Annotated[float | None, Range(*SAMPLING_RANGES["silence_bias"])] = None
    seed: Annotated[int | None, Range(*SAMPLING_RANGES["seed"], whole=True)] = None
    n: Annotated[int, Range(1, lambda limits: limits.answers, whole=True)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Range(0, MOST_LIKELY, whole=True)] = 0
    response_format: ResponseFormat = ResponseFormat()
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Strict(False),
        BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    ] = ()
    stop_token_ids: Annotated[
        tuple[Annotated[int, Range(0, _LAST_TOKEN, whole=True)], ...], Strict(False)
    ] = ()
    min_tokens: Annotated[int, _FEWEST] = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    mm_processor_kwargs: Processor = Processor()
    media_io_kwargs: MediaIO = MediaIO()
    tools: Annotated[tuple[Tool, ...], Strict(False)] = ()
    tool_choice: Annotated[
        _ToolWord | Annotated[NamedTool, Tag("<function>")],
        Discriminator(
            branch,
            custom_error_type="invalid_value",
            custom_error_message="expected none, auto, required, or a function's name",
        ),
    ] = "auto"
    parallel_tool_calls: bool = True

    user: Any = harmless()
    metadata: Any = harmless()
    store: Any = harmless()
    service_tier: Any = harmless()
    safety_identifier: Any = harmless()
    prompt_cache_key: Any = harmless()
    prompt_cache_retention: Any = harmless()
    prompt_cache_options: Any = harmless()
    prediction: Any = harmless()
    request_id: Any = harmless()
    priority: Any = harmless()
    cache_salt: Any = harmless()
    rid: Any = harmless()
    include_reasoning: Any = harmless()
    separate_reasoning: Any = harmless()
    stream_reasoning: Any = harmless()

    best_of: Any = neutral("use n", 1)
    use_beam_search: Any = neutral(_SAMPLING, False)
    prompt_logprobs: Any = neutral("no log-probabilities of prompts", 0)
    functions: Any = neutral(_USE_TOOLS, [])
    function_call: Any = neutral(_USE_TOOLS, "none", "auto")
    length_penalty: Any = neutral(_SAMPLING, 1)
    bad_words: Any = neutral(_SAMPLING, [])
    allowed_token_ids: Any = neutral(_SAMPLING, [])
    modalities: Any = neutral(_TEXT, ["text"])
    audio: Any = neutral(_TEXT)
    verbosity: Any = neutral(_TEXT, "medium")
    reasoning_effort: Any = neutral(_DIRECT, "none")
    reasoning: Any = neutral(_DIRECT, {"effort": "none"}, {"enabled": False})
    thinking: Any = neutral(_DIRECT, {"type": "disabled"})
    enable_thinking: Any = neutral(_DIRECT, False)
    web_search_options: Any = neutral("the model sees what the request has")
    moderation: Any = neutral("neither messages nor answers are moderated")
    echo: Any = neutral("the answer is what is new", False)
    skip_special_tokens: Any = neutral(_TEXT, True)
    spaces_between_special_tokens: Any = neutral("", True, False)
    return_token_ids: Any = neutral(_TEXT, False)
    return_tokens_as_token_ids: Any = neutral(_TEXT, False)
    add_special_tokens: Any = neutral(_AS_TRAINED, False)
    chat_template_kwargs: Any = neutral(
        _AS_TRAINED, {}, {"enable_thinking": False}, {"thinking": False}
    )
    documents: Any = neutral(_AS_TRAINED, [])
    chat_template: Any = neutral(_AS_TRAINED)
    extra_body: Any = neutral("its fields belong into the request itself")
    guided_choice: Any = neutral(_SCHEMA)
    guided_json: Any = neutral(_SCHEMA)
    guided_regex: Any = neutral(_SCHEMA)
    guided_grammar: Any = neutral(_SCHEMA)
    structured_outputs: Any = neutral(_SCHEMA)
