"""The configuration of an evaluation of streams."""

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
    """All settings. Raises ValueError, which names the field, for a wrong value."""

    benchmarks: tuple[str, ...] = ()  # NAME=PATH, a file of questions or a folder of them
    videos: str = ""  # folder of the videos; empty: that of the file of questions
    tasks: tuple[str, ...] = ()  # parts of the names of rows to ask; empty: all rows
    protocol: Literal["both", "official", "push"] = choice("both", ("both", "official", "push"))
    limit: int | None = number(None, above=0)  # items of each row
    context: float = number(0.0, least=0)  # seconds before a question that are watched; 0: all
    patience: float = number(10.0, least=0)  # seconds after a question for an answer to begin
    within: float = number(10.0, least=0)  # seconds after an event for it to be told in time
    max_frames: int = number(256, above=0)  # of a clip in the official protocol
    sessions: int = number(1, above=0, most=64)  # streams at a time
    # Biases of `<|silence|>` for the operating curve over events.
    biases: list[float] = numbers([], least=-100, most=100)  # noqa: RUF009
    prompts: str = ""  # YAML file with templates in place of ours
    url: str = ""  # `http(s)://HOST:PORT` of a server to evaluate in place of an export
    url_key_env: str = "MOSS_API_KEY"  # environment variable with its API key; may be missing
    speaking: SpeakingConfig = field(default_factory=SpeakingConfig)
    judge: EndpointConfig = field(default_factory=_judge)  # used where `judge.model` is given

    def __post_init__(self) -> None:
        check_values(self)
