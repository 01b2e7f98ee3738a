"""A slot from its tokens and pictures, where its keys and values are lost: begin, then `add_frames`
and `add_tokens` in pieces, so that steps of other slots go between them, then `finish`.

What was never dropped is as it was, up to rounding. Of a slot that has dropped text or frames, the
keys and values of what is left are computed anew without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.engine.engine import LONGEST_PASS, VISION_BATCH, Engine
from inference.engine.sampling import Sampling
from inference.engine.slots import Slot

PIECE_FRAMES = VISION_BATCH // 2  # of a slot at a time
PIECE_TOKENS = LONGEST_PASS // 2


@dataclass
class Outline:
    """A slot without its keys and values.

    tokens, positions, position, pending: as in Slot. first: the position of the frame in each used
    place of the ring. count: frames that have come in all. window, sinks: of the engine.
    """

    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    position: int = 0
    pending: int | None = None
    first: list[int] = field(default_factory=list)
    count: int = 0
    window: int = 0
    sinks: int = 0


def check(engine: Engine, outline: Outline) -> None:
    """Raises ValueError for an outline of an engine of other sizes."""
    if (outline.window, outline.sinks) != (engine.window, engine.sinks):
        raise ValueError("the session does not fit this engine: other window or sinks")
    if len(outline.tokens) > engine.max_tokens:
        raise ValueError("the session does not fit this engine: other max_tokens")


def begin(engine: Engine, outline: Outline) -> Slot:
    """A slot that is being rebuilt; EngineFull where none is free."""
    engine.check_free()
    slot = engine.take(outline.sampling)
    slot.ring.first[: len(outline.first)] = outline.first
    slot.ring.count = outline.count
    engine.cache.write_views(slot)
    return slot


@torch.inference_mode()
def add_frames(engine: Engine, slot: Slot, place: int, features: Sequence[Tensor]) -> None:
    """Features `[P, H]` of frames, from a place of the ring on."""
    cache = engine.cache
    states = torch.stack(tuple(features)).to(cache.device, cache.dtype)
    at = torch.tensor(slot.ring.first[place : place + len(features)], device=cache.device)
    rotation = cache.decoder.rotation(at.repeat_interleave(cache.patches)[None], cache.dtype)
    cache.write_frames(slot, place, states.flatten(0, 1), rotation)


@torch.inference_mode()
def add_tokens(engine: Engine, slot: Slot, tokens: Sequence[int], position: int) -> None:
    """Tokens whose positions follow each other, from `position` on. All frames are there."""
    slot.position = position
    engine.run([(slot, list(tokens), ())])


def finish(engine: Engine, slot: Slot, position: int, pending: int | None) -> None:
    """The slot goes on from here."""
    slot.position, slot.pending = position, pending
    engine.set_sampling(slot, slot.sampling)  # which counts the context


def runs(positions: Sequence[int], most: int = PIECE_TOKENS) -> Iterator[tuple[int, int]]:
    """[begin, end) of pieces of at most `most` tokens whose positions follow each other."""
    begin = 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or positions[i] != positions[i - 1] + 1 or i - begin == most:
            yield begin, i
            begin = i
