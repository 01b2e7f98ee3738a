"""What waits for a session, and what its next step takes in."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class Frame:
    """A picture in the queue: uint8 [3, H, W], its second, and when it arrived (monotonic seconds).
    Without a picture: a prompt that waits for the frames before it. source: the number of the
    message that brought it, where a journal names it so."""

    image: Tensor | None
    at: float
    arrived: float
    prompt: str | None = None
    source: int = 0


@dataclass
class Prompt:
    text: str
    arrived: float


@dataclass
class StepRequest:
    """Input of one step: tokens, the picture of each `<|image|>` among them. Without tokens nothing
    but the features of the pictures is computed.

    allowed, likely, attend_all: as in the engine's Step.
    likelihoods: what `likely` asked for, after the step: log-probability of the sampled token; the
        most likely tokens and theirs.
    features: of pictures: instead of `images`, of those that are computed already; after a step
        without tokens, of its own.
    """

    tokens: list[int]
    images: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    sample: bool = True
    began: float = 0.0
    frame: Frame | None = None
    allowed: Tensor | None = None
    likely: int | None = None
    attend_all: bool = False
    likelihoods: tuple[float, list[tuple[int, float]]] | None = None
