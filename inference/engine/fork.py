"""A slot that goes on from what another one has seen: of several answers to one question, only the
first computes the keys and values of the question."""

from __future__ import annotations

from inference.engine.engine import Engine
from inference.engine.sampling import Sampling
from inference.engine.slots import Slot


def fork(engine: Engine, slot: Slot, sampling: Sampling) -> Slot:
    """A new slot with copies of a slot's tokens, frames, keys and values, on the device; to be
    called through `engine.on_all`, between two steps. Nothing may be pending.

    Raises:
        EngineFull: no slot is free.
    """
    engine.check_free()
    made, cache = engine.take(sampling), engine.cache
    made.tokens, made.positions = list(slot.tokens), list(slot.positions)
    made.position = slot.position
    made.ring.first, made.ring.last = list(slot.ring.first), list(slot.ring.last)
    made.ring.count = slot.ring.count
    used = slot.ring.used * cache.patches
    for kept, length in ((cache.text, slot.length), (cache.frames, used)):
        kept[:, :, made.index, :, :length] = kept[:, :, slot.index, :, :length]
    cache.write_views(made)
    Engine.set_sampling(engine, made, sampling)  # what a penalty must know of the tokens
    return made
