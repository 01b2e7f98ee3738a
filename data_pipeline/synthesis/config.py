"""The configuration of a synthesis, with ranges, choices and defaults."""

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
    """The servers that models answer at, and how requests are sent to them."""

    url: str = "http://127.0.0.1:8000/v1"  # up to `/v1`
    model: str = ""  # sees pictures
    text_url: str = ""  # for requests without pictures; empty: `url`
    text_model: str = ""  # for requests without pictures; empty: `model`
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key; may be missing
    # How a reply is made to be JSON: `schema` sends a JSON schema in `response_format`, `object`
    # sends `json_object`, `text` says so in the prompt alone. `auto` begins with `schema` and goes
    # on to the next where a server refuses one.
    json_form: str = choice("auto", JSON_FORMS)
    concurrency: int = number(16, above=0)  # requests at a time
    timeout: float = number(120.0, above=0)  # seconds of a request
    retries: int = number(6, least=0)  # after the first try
    backoff: float = number(1.0, least=0)  # seconds before the first retry, doubled each time
    # Seconds before a retry at most, also where a server asks for more (Retry-After).
    max_wait: float = number(60.0, least=0)
    temperature: float = number(0.7, least=0, most=2)
    max_tokens: int = number(1024, above=0)  # of a reply; doubled where a reply was cut off
    image_tokens: int = number(256, above=0)  # of a frame: for the estimate and the budget

    def of_text(self) -> tuple[str, str]:
        """URL and model of requests without pictures."""
        return self.text_url or self.url, self.text_model or self.model


@dataclass
class CutConfig:
    """How videos are cut into clips, and which pictures of them a model sees."""

    clip: int = number(60, least=4)  # seconds of a clip at most
    shortest: int = number(6, least=3)  # seconds of a clip at least
    window: int = number(2, above=0)  # seconds that share a caption
    frame_side: int = number(448, least=32)  # pixels of a picture's longer side at most
    frames: int = number(48, least=4)  # of a request at most; of more the older are thinned out


@dataclass
class WriteConfig:
    """Which samples a model writes for a clip."""

    roles: tuple[str, ...] = ROLES
    per_role: int = number(1, above=0)  # samples of each role, for each clip
    pace: int = number(4, above=0)  # words that are said after each frame, so each second


@dataclass
class CheckConfig:
    """How captions and candidates are checked."""

    # Votes by which yes or no must lead. Where one vote in ten is wrong, a verdict is wrong in
    # 1.2 % of cases with 2, in 0.14 % with 3.
    lead: int = number(3, above=0)
    most_votes: int = number(15, above=0, most=99)  # after which a question is undecided
    recaptions: int = number(3, least=0, most=9)  # of a window whose caption is not confirmed
    silences: int = number(1, least=0)  # seconds of silence that are checked
    # Share of common words from which two questions of a clip count as the same.
    similar: float = number(0.9, above=0, most=1)


@dataclass
class OutputConfig:
    """What a synthesis may cost, and the form of its shards (as of `moss-data import`)."""

    price_in: float = number(0.0, least=0)  # of 10^6 tokens in prompts
    price_out: float = number(0.0, least=0)  # of 10^6 tokens in replies
    # In the same currency, over all runs into a folder; None: no limit.
    budget: float | None = number(None, above=0)
    samples_per_shard: int = number(1000, above=0)
    shard_size: float = number(512.0, above=0)  # MB
    max_side: int | None = number(None, least=16)  # pixels
    video_fps: float | None = number(None, above=0)


@dataclass
class SynthesisConfig:
    """All settings of a synthesis. Raises ValueError, which names the field, for a wrong value."""

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
        """Checks what must be known before anything is sent. Raises ValueError."""
        for name in ("url", "text_url"):
            url = getattr(self.endpoint, name)
            parts = urlsplit(url)
            if (url or name == "url") and not (parts.scheme in ("http", "https") and parts.netloc):
                raise ValueError(f"endpoint.{name}={url}: must be http://HOST:PORT/v1 or https://")
        if not self.endpoint.model:
            raise ValueError("endpoint.model: is missing: the name that the server knows it by")


def config_from(values: dict[str, Any]) -> SynthesisConfig:
    """The configuration from `{group: {field: value}}`, as in a YAML file. Raises ValueError for a
    wrong value, and for a group or field that there is not."""
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
        values_of_group = {n: tuple(v) if isinstance(v, list) else v for n, v in entries.items()}
        groups[group] = kinds[group](**values_of_group)
    return SynthesisConfig(**groups)
