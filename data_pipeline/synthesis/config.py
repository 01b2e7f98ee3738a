"""What may be configured of a synthesis, with ranges, choices and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints
from urllib.parse import urlsplit

from data_pipeline.fields import check_values, choice, number

# What a sample can teach (docs/synthesis.md); prompts.yaml has an instruction for each.
ROLES = (
    "fire_once",
    "resident",
    "commentary",
    "counting",
    "interruption",
    "self_correction",
    "never",
)
JSON_FORMS = ("auto", "schema", "object", "text")


@dataclass
class EndpointConfig:
    """Where the models answer, and how they are asked.

    url: up to `/v1`. model: sees pictures. text_url, text_model: for requests without pictures;
    empty: the same. api_key_env: the environment variable that has the key; it may be missing.
    json_form: `schema` asks by a JSON Schema in `response_format`, `object` by `json_object`,
    `text` in the prompt alone; `auto` goes on to the next where a server refuses one.
    """

    url: str = "http://127.0.0.1:8000/v1"
    model: str = ""
    text_url: str = ""
    text_model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    json_form: str = choice("auto", JSON_FORMS)
    concurrency: int = number(16, above=0)  # requests at a time
    timeout: float = number(120.0, above=0)  # seconds of a request
    retries: int = number(6, least=0)  # after the first try
    backoff: float = number(1.0, least=0)  # seconds before the first retry, doubled each time
    max_wait: float = number(60.0, least=0)  # seconds before a retry at most, Retry-After aside
    temperature: float = number(0.7, least=0, most=2)
    max_tokens: int = number(1024, above=0)  # of a reply; doubled where a reply was cut off
    image_tokens: int = number(256, above=0)  # of a frame: for the estimate and the budget

    def of_text(self) -> tuple[str, str]:
        """URL and model of requests without pictures."""
        return self.text_url or self.url, self.text_model or self.model


@dataclass
class CutConfig:
    """clip, shortest: seconds. window: seconds that are captioned together. frame_side: pixels.
    frames: of a request at most; of more the older ones are thinned out."""

    clip: int = number(60, least=4)
    shortest: int = number(6, least=3)
    window: int = number(2, above=0)
    frame_side: int = number(448, least=32)
    frames: int = number(48, least=4)


@dataclass
class WriteConfig:
    """roles: of ROLES. per_role: samples of each role that are asked for, for each clip. pace:
    words that are said after a frame, a second's."""

    roles: tuple[str, ...] = ROLES
    per_role: int = number(1, above=0)
    pace: int = number(4, above=0)


@dataclass
class CheckConfig:
    """lead: votes by which yes or no must lead; where a vote is wrong in one of ten cases, a
    verdict is so in 1.2 % with 2, in 0.14 % with 3. most_votes: then a question is undecided.
    recaptions: of a window whose caption is not confirmed. silences: seconds of silence that are
    checked. similar: share of common words from which two questions of a clip are one."""

    lead: int = number(3, above=0)
    most_votes: int = number(15, above=0, most=99)
    recaptions: int = number(3, least=0, most=9)
    silences: int = number(1, least=0)
    similar: float = number(0.9, above=0, most=1)


@dataclass
class OutputConfig:
    """price_in, price_out: of 10^6 tokens. budget: in the same currency, over all runs into a
    folder; None: no limit. samples_per_shard, shard_size (MB), max_side (pixels), video_fps: as
    an import's."""

    price_in: float = number(0.0, least=0)
    price_out: float = number(0.0, least=0)
    budget: float | None = number(None, above=0)
    samples_per_shard: int = number(1000, above=0)
    shard_size: float = number(512.0, above=0)
    max_side: int | None = number(None, least=16)
    video_fps: float | None = number(None, above=0)


@dataclass
class SynthesisConfig:
    """Wrong values raise ValueError that names the field."""

    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        check_values(self)
        unknown = sorted(set(self.write.roles) - set(ROLES))
        if unknown or not self.write.roles:
            raise ValueError(f"write.roles={','.join(unknown)}: choose of {', '.join(ROLES)}")
        if len(set(self.write.roles)) < len(self.write.roles):
            raise ValueError(f"write.roles={','.join(self.write.roles)}: a role is there twice")
        if self.cut.shortest > self.cut.clip:
            raise ValueError(
                f"cut.shortest={self.cut.shortest}: must be at most cut.clip ({self.cut.clip})"
            )
        if self.check.most_votes < self.check.lead:
            raise ValueError(f"check.most_votes={self.check.most_votes}: must be at least "
                             f"check.lead ({self.check.lead})")  # fmt: skip
        if self.output.budget is not None and not self.output.price_in + self.output.price_out:
            raise ValueError("output.budget: needs output.price_in or output.price_out; with "
                             "both 1 it counts 10^6 tokens")  # fmt: skip

    def check_endpoint(self) -> None:
        """What must be known before anything is sent; ValueError."""
        for name in ("url", "text_url"):
            url = getattr(self.endpoint, name)
            parts = urlsplit(url)
            if (url or name == "url") and not (parts.scheme in ("http", "https") and parts.netloc):
                raise ValueError(f"endpoint.{name}={url}: must be http://HOST:PORT/v1 or https://")
        if not self.endpoint.model:
            raise ValueError("endpoint.model: is missing: the name that the server knows it by")


def config_from(values: dict[str, Any]) -> SynthesisConfig:
    """The configuration of `{group: {field: value}}`, as a YAML file has it; ValueError for what is
    not a field."""
    groups: dict[str, Any] = {}
    kinds = get_type_hints(SynthesisConfig)
    for group, entries in values.items():
        if group not in kinds or not is_dataclass(kinds[group]):
            raise ValueError(f"{group}: is not a group: {', '.join(kinds)}")
        if not isinstance(entries, dict):
            raise ValueError(f"{group}: {entries!r}: expected fields with values")
        known = [entry.name for entry in fields(kinds[group])]
        for name in entries:
            if name not in known:
                raise ValueError(f"{group}.{name}: is not a field: {', '.join(known)}")
        given = {n: tuple(v) if isinstance(v, list) else v for n, v in entries.items()}
        groups[group] = kinds[group](**given)
    return SynthesisConfig(**groups)
