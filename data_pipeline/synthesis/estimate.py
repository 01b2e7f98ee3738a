"""Estimates what a synthesis will cost, before it starts: requests, tokens, money."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import av

from data_pipeline import files
from data_pipeline.synthesis.config import SynthesisConfig
from data_pipeline.synthesis.cut import Source
from data_pipeline.synthesis.prompts import KINDS, Prompts
from data_pipeline.tables import format_table

# Guesses that hold for videos of an event every few seconds; a run prints what it really took.
_ANSWERS = 2.5  # answers of a sample
_DECIDED = 0.8  # by how much each vote moves the lead, if one in ten is wrong
_LEFT = 0.7  # share of candidates that pass the audit
_OTHER_WORDS = 0.3  # share of replies whose words differ, which a model must compare
_EVENTS = 0.3  # events a second
# Tokens of a reply by kind of request.
_WRITTEN = {"caption": 60, "confirm": 20, "write": 150, "audit": 25, "say": 15, "same": 8}


@dataclass(frozen=True)
class Estimate:
    """The estimate for a set of videos."""

    videos: int  # without those left out
    left_out: int  # videos that are too short, or whose header states no length
    seconds: float
    clips: int
    requests: dict[str, float]  # by kind
    tokens: dict[str, tuple[float, float]]  # by kind: in prompts, in replies

    @property
    def total(self) -> tuple[float, float]:
        """Tokens of all prompts, and of all replies."""
        columns = zip(*self.tokens.values(), strict=True)
        tokens_in, tokens_out = (sum(column) for column in columns)
        return tokens_in, tokens_out

    def lines(self, config: SynthesisConfig) -> list[str]:
        """The estimate as text: a summary with the cost, then a table by kind of request."""
        rows = [["requests", "number", "tokens in", "tokens out"]]
        rows += [[kind, f"{self.requests[kind]:.0f}", *(f"{n / 1e6:.2f}M" for n in tokens)]
                 for kind, tokens in self.tokens.items()]  # fmt: skip
        total = [f"{n / 1e6:.2f}M" for n in self.total]
        rows.append(["all", f"{sum(self.requests.values()):.0f}", *total])
        price = (config.output.price_in, config.output.price_out)
        cost = sum(n * p for n, p in zip(self.total, price, strict=True)) / 1e6
        head = (f"estimate: {self.videos} videos, {self.seconds:.0f} s, {self.clips} clips"
                + (f", cost {cost:.2f}" if any(price) else ""))  # fmt: skip
        if self.left_out:
            head += (f"; {self.left_out} videos left out: shorter than --shortest "
                     f"{config.cut.shortest} s, or their headers state no length")  # fmt: skip
        return [head, *format_table(rows).splitlines()]


def estimate(sources: Sequence[Source], config: SynthesisConfig, prompts: Prompts) -> Estimate:
    """Estimates from the headers of the videos. Requests whose replies are stored already are
    counted, too, though they cost nothing."""
    stated = map(_length, sources)
    # The run takes a frame each whole second, so a video of 5.2 s has six.
    lengths = [one for one in stated if math.ceil(one - 1e-3) >= config.cut.shortest]
    clips = [math.ceil(length / config.cut.clip) for length in lengths]
    requests = dict.fromkeys(KINDS, 0.0)
    tokens_in = dict.fromkeys(KINDS, 0.0)
    for length, count in zip(lengths, clips, strict=True):
        for kind, number, size in _of_clip(length / count, config, prompts):
            requests[kind] += count * number
            tokens_in[kind] += count * number * size
    tokens = {kind: (tokens_in[kind], requests[kind] * _WRITTEN[kind]) for kind in KINDS}
    left_out = len(sources) - len(lengths)
    return Estimate(len(lengths), left_out, sum(lengths), sum(clips), requests, tokens)


def _length(source: Source) -> float:
    """The length in seconds that the header states; 0 where it states none."""
    try:
        with (
            files.open_file(source.path) as file,
            av.open(file, "r", options={"protocol_whitelist": "none"}) as container,
        ):
            return (container.duration or 0) / 1e6
    except Exception:  # whatever it is: the run itself reports what is wrong with the file
        return 0.0


def _of_clip(
    seconds: float, config: SynthesisConfig, prompts: Prompts
) -> list[tuple[str, float, float]]:
    """(kind, number of requests, tokens of each prompt) for a clip of so many seconds."""
    votes = config.check.lead / _DECIDED
    windows = math.ceil(seconds / config.cut.window)
    samples = len(config.write.roles) * config.write.per_role
    checked = samples * _LEFT
    looks = checked * votes * (2 * _ANSWERS + config.check.silences)
    image = config.endpoint.image_tokens
    picture_tokens = min(seconds / 2, config.cut.frames) * image
    timeline = (windows + seconds * _EVENTS) * 20
    fixed = {
        kind: (len(prompts.system) + len(prompts.tasks[kind])
               + len(json.dumps(prompts.schemas[kind]))) / 4
        for kind in KINDS
    }  # fmt: skip
    sizes = {
        "caption": 2 * config.cut.window * image,
        "confirm": 2 * config.cut.window * image + 60,
        "write": timeline + 100,
        "audit": timeline + 200,
        "say": picture_tokens + 80,
        "same": 40.0,
    }
    numbers = {
        "caption": 1.1 * windows,
        "confirm": 1.1 * votes * windows,
        "write": float(len(config.write.roles)),
        "audit": samples * votes,
        "say": looks,
        "same": looks * _OTHER_WORDS,
    }
    return [(kind, numbers[kind], fixed[kind] + sizes[kind]) for kind in KINDS]
