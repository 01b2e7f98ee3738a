"""A slot on the host: its tokens and frames, and which of them are dropped when it is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from inference.engine.sampling import Sampling

NEVER = 2**40  # a position that no token reaches


@dataclass(frozen=True)
class Eviction:
    """What a full slot dropped: positions of frames, or of tokens of text."""

    kind: Literal["frame", "text"]
    positions: tuple[int, ...]


class FrameRing:
    """Which of `window` + 1 places of frames holds which frame, and who sees it.

    The last place is for a frame that arrives when the ring is full: tokens before it still see
    the frame that it will replace. After the pass it takes that frame's place
    (`commit_eviction`). The first `sinks` frames are never replaced.

    first, last: a token at position t sees place i if first[i] <= t < last[i].
    """

    def __init__(self, window: int, sinks: int):
        self.window, self.sinks, self.count = window, sinks, 0
        self.first, self.last = [NEVER] * (window + 1), [NEVER] * (window + 1)
        self.victim: int | None = None

    @property
    def used(self) -> int:
        """Places in use, counted from the first."""
        return min(self.count, self.window) + (self.victim is not None)

    @property
    def room(self) -> int:
        """How many frames one pass may bring."""
        return max(self.window - self.count, 1)

    @property
    def positions(self) -> list[int]:
        """Positions of the frames in the ring, oldest first."""
        return sorted(self.first[: self.used])

    def put(self, position: int) -> tuple[int, int | None]:
        """Takes a frame; returns its place, and the position of the frame that it replaces."""
        place, replaced = self.count, None
        if self.count >= self.window:
            turn = (self.count - self.window) % (self.window - self.sinks)
            self.victim, place = self.sinks + turn, self.window
            replaced = self.first[self.victim]
            self.last[self.victim] = position
        self.first[place] = position
        self.count += 1
        return place, replaced

    def commit_eviction(self) -> int | None:
        """Moves the frame of the last place to that of its victim; returns the victim's place."""
        victim, self.victim = self.victim, None
        if victim is not None:
            self.first[victim], self.last[victim] = self.first[-1], NEVER
            self.first[-1] = NEVER
        return victim


@dataclass(frozen=True)
class Mark:
    """What `Slot.undo` brings back: counts, and copies of the ring's lists."""

    tokens: int
    position: int
    evictions: int
    ring: dict[str, Any]


@dataclass
class Slot:
    """One session in the engine.

    tokens, positions: the cached tokens and where in the stream each stands.
    position: of the next token; it only grows, also when tokens are dropped.
    pending: the sampled token that is not cached yet: the next step begins with it.
    likely: of the last step that asked for it, on the device: see `token_choice.read_likely`.
    evictions: what was dropped, oldest first; the reader empties it.
    """

    index: int
    sampling: Sampling
    ring: FrameRing
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    position: int = 0
    pending: int | None = None
    likely: Tensor | None = None
    evictions: list[Eviction] = field(default_factory=list)
    closed: bool = False
    # A step failed when part of the context was already overwritten, or its logits were NaN.
    broken: bool = False

    @property
    def length(self) -> int:
        """Cached tokens."""
        return len(self.tokens)

    @property
    def frames(self) -> list[int]:
        """Positions of the cached frames, oldest first."""
        return self.ring.positions

    def append(self, tokens: Sequence[int]) -> None:
        """Adds tokens that are cached now."""
        self.tokens += tokens
        self.positions += range(self.position, self.position + len(tokens))
        self.position += len(tokens)

    def keep(self, indices: list[int]) -> None:
        """Drops all tokens but these, and adds an Eviction."""
        kept = set(indices)
        dropped = tuple(p for i, p in enumerate(self.positions) if i not in kept)
        self.tokens = [self.tokens[i] for i in indices]
        self.positions = [self.positions[i] for i in indices]
        self.evictions.append(Eviction("text", dropped))

    def mark(self) -> Mark:
        """What `undo` needs; to be taken before a step."""
        ring = {**vars(self.ring), "first": [*self.ring.first], "last": [*self.ring.last]}
        return Mark(self.length, self.position, len(self.evictions), ring)

    def undo(self, mark: Mark) -> None:
        """Brings the slot back to where it was before a step that failed, but for text that was
        dropped to make room. Where that cannot be, because a pass has overwritten a frame or moved
        the text, the slot is `broken`."""
        new = self.evictions[mark.evictions :]
        if self.position > mark.position:
            if new:
                self.broken = True
                return
            del self.tokens[mark.tokens :], self.positions[mark.tokens :]
            self.position = mark.position
        self.evictions[mark.evictions :] = [one for one in new if one.kind == "text"]
        vars(self.ring).update(mark.ring)


@dataclass
class Step:
    """One slot's input of an engine step.

    tokens: appended after the slot's pending token.
    frames: features from `encode`, one for each `<|image|>` in `tokens`.
    sample: False: no token is sampled, nothing is pending, and the next step must bring tokens.
    allowed: tokens that may be sampled, a bit each (int32, on the CPU; token_choice.py); None: all.
    likely: how many of the most likely tokens `slot.likely` shall tell; None: it is not told.
    attend_all: of a slot without frames: tokens before the step's first frame attend all of its
        frames, as in EngineConfig's tokens_before_first_frame.
    """

    slot: Slot
    tokens: Sequence[int] = ()
    frames: Sequence[Tensor] = ()
    sample: bool = True
    allowed: Tensor | None = None
    likely: int | None = None
    attend_all: bool = False

    @property
    def inputs(self) -> list[int]:
        """The tokens that it forwards: the slot's pending one, and its own."""
        pending = self.slot.pending
        return [*([] if pending is None else [pending]), *self.tokens]


def tokens_to_keep(
    tokens: Sequence[int], drop: int, silence: int | None, image: int, end_of_turn: int | None
) -> list[int]:
    """Indices of the tokens that stay when at least `drop` of them are dropped.

    The head (up to the first end of turn: the system prompt) and the last quarter stay. Dropped
    are first the oldest pairs of silence and frame, then the oldest other tokens; if that is not
    enough, the oldest of the last quarter too.
    """
    quarter = len(tokens) // 4
    head = 1
    if end_of_turn in tokens[:quarter]:
        head = tokens.index(end_of_turn) + 1
    tail = len(tokens) - quarter
    dropped: set[int] = set()
    i = head
    while i + 1 < tail and len(dropped) < drop:
        if tokens[i] == silence and tokens[i + 1] == image:
            dropped |= {i, i + 1}
            i += 1
        i += 1
    for i in range(head, len(tokens)):
        if len(dropped) >= drop:
            break
        dropped.add(i)
    return [i for i in range(len(tokens)) if i not in dropped]


def check_steps(
    steps: Sequence[Step],
    *,
    max_tokens: int,
    vocabulary: int,
    image_token: int,
    frame_shape: tuple[int, int],
) -> None:
    """Raises ValueError for steps that are not possible.

    Args:
        max_tokens: of a slot.
        frame_shape: of a frame's features.
    """
    used: set[int] = set()
    for step in steps:
        slot = step.slot
        if slot.closed:
            raise ValueError(f"slot {slot.index} is closed")
        if slot.broken:
            raise ValueError(f"slot {slot.index} lost its context in a step that failed, or is NaN")
        if slot.index in used:
            raise ValueError(f"slot {slot.index} has two steps at once")
        used.add(slot.index)
        count = len(step.inputs)
        if count == 0:
            raise ValueError(f"slot {slot.index} has no pending token and gets none")
        if count > max_tokens // 2 and slot.length + count > max_tokens:
            raise ValueError(
                f"a step of {count} tokens does not fit: slot {slot.index} has {slot.length} "
                f"of max_tokens={max_tokens}"
            )
        images = sum(token == image_token for token in step.tokens)
        if images != len(step.frames):
            raise ValueError(
                f"slot {slot.index}: {images} <|image|> tokens, but {len(step.frames)} frames"
            )
        if not all(0 <= token < vocabulary for token in step.tokens):
            raise ValueError(f"slot {slot.index}: tokens must be from 0 to {vocabulary - 1}")
        for frame in step.frames:
            if tuple(frame.shape) != frame_shape:
                raise ValueError(f"a frame of {tuple(frame.shape)}, expected {frame_shape}")
