"""A slot as plain data on the CPU, and back: for `Engine.save` and `Engine.restore`."""

from __future__ import annotations

from typing import Any

from inference.engine.cache import KVCache
from inference.engine.sampling import Sampler
from inference.engine.slots import Eviction, Slot


def state_of(slot: Slot, sampler: Sampler, cache: KVCache) -> dict[str, Any]:
    """A slot as plain values and CPU tensors; torch.save can write it."""
    return {
        "version": 1,
        "window": slot.ring.window,
        "sinks": slot.ring.sinks,
        "slot": {
            "tokens": list(slot.tokens),
            "positions": list(slot.positions),
            "position": slot.position,
            "pending": slot.pending,
            "evictions": [(e.kind, e.positions) for e in slot.evictions],
        },
        "ring": {"first": list(slot.ring.first), "count": slot.ring.count},
        "sampling": dict(vars(slot.sampling)),
        "seen": sampler.seen[slot.index].cpu().clone(),
        "said": sampler.said[slot.index].cpu().clone() if slot.sampling.counts else None,
        **cache.save(slot),
    }


def fill(slot: Slot, state: dict[str, Any], sampler: Sampler, cache: KVCache) -> None:
    """Fills a slot that was just opened with `state`."""
    parts = dict(state["slot"])
    slot.evictions = [Eviction(kind, tuple(at)) for kind, at in parts.pop("evictions")]
    for name, value in parts.items():
        setattr(slot, name, list(value) if isinstance(value, list) else value)
    slot.ring.first, slot.ring.count = list(state["ring"]["first"]), state["ring"]["count"]
    cache.restore(slot, state)
    sampler.seen[slot.index] = state["seen"].to(cache.device)
    if state.get("said") is not None:
        sampler.said[slot.index] = state["said"].to(cache.device)


def check(state: dict[str, Any], cache: KVCache, sinks: int) -> None:
    """Raises ValueError for a state of another model or other sizes than the cache's."""
    text, frames = state["text"], state["frames"]
    layout = cache.text.shape
    wrong = {
        "window": state["window"] != cache.window,
        "sinks": state["sinks"] != sinks,
        "max_tokens": text.shape[-2] > cache.max_tokens,
        "model": text.shape[:2] != layout[:2]
        or text.shape[2] != layout[3]
        or frames.shape[0] != cache.frames.shape[0],
    }
    mismatches = [name for name, value in wrong.items() if value]
    if mismatches:
        raise ValueError(f"the saved session does not fit this engine: other {mismatches[0]}")
