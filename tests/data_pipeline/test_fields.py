"""Every number of every configuration has a range, every name its choices, and both are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from data_pipeline.build import BuildOptions
from data_pipeline.fields import ALLOWED, Range, choice, number, numbers, wrong_values
from data_pipeline.importers.media import MediaOptions
from data_pipeline.synthesis.config import SynthesisConfig
from data_pipeline.toy.build import ToyConfig
from inference.engine.engine_config import EngineConfig
from inference.engine.sampling import Sampling
from inference.evaluate.streaming.config import StreamingConfig
from inference.serve.limits import Limits
from inference.session.session import SessionConfig
from moss_train.config import Config
from moss_train.data_config import EvalSuiteConfig, SourceConfig

# Texts that are free: names that a user gives, paths, patterns.
FREE = {
    "Config.init_from", "RunConfig.dir", "StageConfig.name", "StageConfig.train",
    "StageConfig.also", "ModelConfig.name", "InitConfig.from_llama", "DataConfig.name",
    "DataConfig.root", "DataConfig.tokenizer", "SourceConfig.name", "SourceConfig.path",
    "EvalSuiteConfig.name", "EvalSuiteConfig.path",
    "AdapterConfig.target", "TrainerConfig.resume", "LoggerConfig.project", "ToyConfig.stages",
    "SessionConfig.system_prompt", "SessionConfig.prompt", "SourceOptions.form",
    "SourceOptions.media_dir", "SourceOptions.datasets", "SourceOptions.splits",
    "SourceOptions.media_column", "SourceOptions.caption_column", "TrainerConfig.profile",
    "EndpointConfig.url", "EndpointConfig.model", "EndpointConfig.text_url",
    "EndpointConfig.text_model", "EndpointConfig.api_key_env", "WriteConfig.roles",
    "StreamingConfig.benchmarks", "StreamingConfig.videos", "StreamingConfig.tasks",
    "StreamingConfig.prompts", "StreamingConfig.url", "StreamingConfig.url_key_env",
    "SpeakingConfig.system_prompt",
    "StoreOptions.cache",
}  # fmt: skip

Entry = tuple[type, Field, set[type]]


def entries(kind: type, seen: set[type]) -> Iterator[Entry]:
    """Each field of a dataclass and of those inside it, with the types that its value can have."""
    if kind in seen:
        return
    seen.add(kind)
    hints = get_type_hints(kind)
    for entry in fields(kind):
        inside = [hints[entry.name]]
        kinds: set[type] = set()
        while inside:
            hint = inside.pop()
            inside += get_args(hint)
            if isinstance(hint, type) and not get_args(hint):
                kinds.add(hint)
        yield kind, entry, kinds
        for inner in kinds:
            if is_dataclass(inner):
                yield from entries(inner, seen)


SEEN: set[type] = set()
ROOTS = (
    Config, BuildOptions, SynthesisConfig, ToyConfig, EngineConfig, Limits, SessionConfig,
    StreamingConfig,
)  # fmt: skip
ENTRIES = [entry for root in ROOTS for entry in entries(root, SEEN)]


def named(kinds: set[type]) -> list[Any]:
    return [
        pytest.param(kind, entry, id=f"{kind.__name__}.{entry.name}")
        for kind, entry, found in ENTRIES
        if found & kinds
    ]


def filled(kind: type) -> Any:
    """One with its defaults; names and paths have none."""
    given = {SourceConfig: ("a", "x", "text"), EvalSuiteConfig: ("a", "x")}
    return kind(*given.get(kind, ()))


def put(config: Any, name: str, value: Any) -> None:
    """Sets a field, of a frozen dataclass too."""
    object.__setattr__(config, name, value)


def step(bound: float, sign: int, whole: bool) -> float:
    """The number next to a bound."""
    return bound + sign if whole else math.nextafter(bound, sign * math.inf)


@pytest.mark.parametrize(("kind", "entry"), named({int, float}))
def test_every_number_has_a_range_that_is_kept(kind: type, entry: Field) -> None:
    allowed = entry.metadata[ALLOWED]
    assert isinstance(allowed, Range)
    whole = "int" in str(entry.type) and "float" not in str(entry.type)
    outside: list[Any] = [math.nan, math.inf, -math.inf, "3"]
    inside: list[Any] = []
    for bound, sign, closed in (
        (allowed.least, -1, True), (allowed.above, -1, False),
        (allowed.most, 1, True), (allowed.below, 1, False),
    ):  # fmt: skip
        if bound is not None:
            beyond = step(bound, sign, whole)
            outside.append(beyond if closed else bound)
            inside.append(bound if closed else step(bound, -sign, whole))
    if whole:
        outside.append(2.5)
    config = filled(kind)
    held = getattr(config, entry.name)
    assert list(wrong_values(config)) == []

    def holding(value: Any) -> Any:
        return [value] if isinstance(held, list) else {5: value} if held == {} else value

    for value in outside:
        put(config, entry.name, holding(value))
        (line,) = wrong_values(config, "group.")
        assert line.startswith(f"group.{entry.name}={holding(value)}: must be ")
    for value in inside:
        put(config, entry.name, holding(value))
        assert list(wrong_values(config)) == []


@pytest.mark.parametrize(("kind", "entry"), named({str}))
def test_every_name_has_its_choices(kind: type, entry: Field) -> None:
    if f"{kind.__name__}.{entry.name}" in FREE:
        assert ALLOWED not in entry.metadata
        return
    config = filled(kind)
    is_list = isinstance(getattr(config, entry.name), list)
    for value in entry.metadata[ALLOWED]:
        put(config, entry.name, [value] if is_list else value)
        assert list(wrong_values(config)) == []
    wrong = [value, value + "x"] if is_list else value + "x"
    put(config, entry.name, wrong)
    listed = ", ".join(entry.metadata[ALLOWED])
    how = "some of" if is_list else "one of"
    assert list(wrong_values(config)) == [f"{entry.name}={wrong}: choose {how} {listed}"]


def test_those_that_check_themselves_raise_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"^shard_size=nan: must be .*; workers=-1: must be 0 \("):
        BuildOptions(shard_size=math.nan, workers=-1)
    with pytest.raises(ValueError, match=r"^window=inf: must be a whole number, greater than 0$"):
        EngineConfig(window=math.inf)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^fps=inf: must be a finite number, greater than 0$"):
        Limits(fps=math.inf)
    with pytest.raises(ValueError, match=r"^clock=sun: choose .*; pace=0: must be greater than 0"):
        SessionConfig(pace=0, clock="sun")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^sampling: top_p=0: must be greater than 0 and at most"):
        Sampling(top_p=0)
    with pytest.raises(ValueError, match=r"^max_side=15: must be 16 or more$"):
        MediaOptions(max_side=15)
    with pytest.raises(ValueError, match=r"^size=30: must be 32 or more$"):
        ToyConfig(size=30)


def test_the_dtypes_are_those_of_the_hardware() -> None:
    from moss_train.hardware import DTYPES

    (dtype,) = (entry for _, entry, _ in ENTRIES if entry.name == "dtype")
    assert set(dtype.metadata[ALLOWED]) == set(DTYPES)


@dataclass
class Inner:
    weight: float = number(1.0, above=0)
    name: str = ""


@dataclass
class Outer:
    share: float = number(0.5, least=0, below=1)
    often: int | None = number(None, least=0, zero="never")
    any_sign: float = number(0.0)
    angle: float = number(0.0, above=-2, most=2)
    cold: float = number(0.0, below=3)
    mode: str = choice("on", ("on", "off"))
    places: list[int] = numbers([1], least=0)  # noqa: RUF009
    inner: Inner = field(default_factory=Inner)
    several: list[Inner] = field(default_factory=list)


def test_a_line_names_field_value_and_what_is_allowed() -> None:
    wrong = Outer(
        1.0, -1, math.inf, -2.0, 3.0, "auto", [3, -1, 2], Inner(0.0), [Inner(), Inner(-1.0, "b")]
    )
    assert list(wrong_values(wrong)) == [
        "share=1.0: must be 0 or more and less than 1",
        "often=-1: must be 0 (never) or more",
        "any_sign=inf: must be a finite number",
        "angle=-2.0: must be greater than -2 and at most 2",
        "cold=3.0: must be less than 3",
        "mode=auto: choose one of on, off",
        "places=[-1]: must be 0 or more",
        "inner.weight=0.0: must be greater than 0",
        "several[b].weight=-1.0: must be greater than 0",
    ]
    assert list(wrong_values(Outer(often=2.5))) == [  # type: ignore[arg-type]
        "often=2.5: must be a whole number, 0 (never) or more"
    ]
    assert list(wrong_values(Outer(often=2**63))) == [
        f"often={2**63}: must be a whole number of 64 bits, 0 (never) or more"
    ]
    assert list(wrong_values(Outer(share=None))) == [  # type: ignore[arg-type]
        "share=None: must be a finite number, 0 or more and less than 1"
    ]
    assert list(wrong_values(Outer())) == []
