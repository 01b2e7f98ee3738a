"""What may be configured of an evaluation of streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.fields import check_values, choice, number, numbers
from data_pipeline.synthesis.config import EndpointConfig
from inference.evaluate.streaming.speaker import SpeakingConfig


def _judge() -> EndpointConfig:
    return EndpointConfig(temperature=0.0, max_tokens=256, concurrency=4)


@dataclass(frozen=True)
class StreamingConfig:
    """Wrong values raise ValueError that names the field.

    benchmarks: NAME=PATH, a file of questions or a folder of them. videos: the folder of their
    sources (default: that of the file). tasks: rows that are asked, by a part of their names;
    empty: all. limit: items of each row. context: seconds before a question that are watched; 0:
    all. patience: seconds after a question in which an answer may begin. within: seconds in which
    an event is told in time. max_frames: of a clip in the official protocol. sessions: streams at a
    time. biases: of `<|silence|>`, for the operating curve over events. prompts: YAML with words in
    place of ours. judge: used where its model is named. url: `http(s)://HOST:PORT` of a server
    that is asked in place of an export; url_key_env: environment variable with its API key, which
    may be missing.
    """

    benchmarks: tuple[str, ...] = ()
    videos: str = ""
    tasks: tuple[str, ...] = ()
    protocol: Literal["both", "official", "push"] = choice("both", ("both", "official", "push"))
    limit: int | None = number(None, above=0)
    context: float = number(0.0, least=0)
    patience: float = number(10.0, least=0)
    within: float = number(10.0, least=0)
    max_frames: int = number(256, above=0)
    sessions: int = number(1, above=0, most=64)
    biases: list[float] = numbers([], least=-100, most=100)  # noqa: RUF009
    prompts: str = ""
    url: str = ""
    url_key_env: str = "MOSS_API_KEY"
    speaking: SpeakingConfig = field(default_factory=SpeakingConfig)
    judge: EndpointConfig = field(default_factory=_judge)

    def __post_init__(self) -> None:
        check_values(self)
