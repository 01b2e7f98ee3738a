"""A slot from its tokens and pictures, where its keys and values are lost: begin, then `add_frames`
and `add_tokens` in pieces, so that steps of other slots go between them, then `finish`
(session/rebuilder.py).

What was never dropped is as it was, up to rounding. Of a slot that has dropped text or frames, the
keys and values of what is left are computed anew without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.engine.engine import Engine
from inference.engine.sampling import Sampling
from inference.engine.slots import Slot


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
    """Writes features `[P, H]` of frames into a slot's ring, from `place` on."""
    cache = engine.cache
    states = torch.stack(tuple(features)).to(cache.device, cache.dtype)
    at = torch.tensor(slot.ring.first[place : place + len(features)], device=cache.device)
    rotation = cache.decoder.rotation(at.repeat_interleave(cache.patches)[None], cache.dtype)
    cache.write_frames(slot, place, states.flatten(0, 1), rotation)


@torch.inference_mode()
def add_tokens(engine: Engine, parts: Sequence[tuple[Slot, list[int], int]]) -> None:
    """Runs tokens of slots whose frames are all there, in one pass: of each slot some whose
    positions follow each other, from a position on."""
    for slot, _, position in parts:
        slot.position = position
    engine.packed.forward([(slot, tokens, ()) for slot, tokens, _ in parts])


def finish(engine: Engine, slot: Slot, position: int, pending: int | None) -> None:
    """Ends the rebuilding: the slot goes on from here."""
    slot.position, slot.pending = position, pending
    engine.set_sampling(slot, slot.sampling)  # which counts the context
