"""A slot as plain data on the CPU, and back: for `Engine.save` and `Engine.restore`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

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
        "seen": sampler.in_context[slot.index].cpu().clone(),
        "said": sampler.sampled_counts[slot.index].cpu().clone() if slot.sampling.counts else None,
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
    sampler.in_context[slot.index] = state["seen"].to(cache.device)
    if state.get("said") is not None:
        sampler.sampled_counts[slot.index] = state["said"].to(cache.device)


def check(
    state: dict[str, Any], cache: KVCache, sampler: Sampler, *, sinks: int, ranks: int = 1
) -> None:
    """Raises ValueError for a state of another model or other sizes than those of an engine, of
    whose KV heads `cache` has those of one of `ranks`."""
    used = min(state["ring"]["count"], state["window"])
    wrong = {
        "window": state["window"] != cache.window,
        "sinks": state["sinks"] != sinks,
        "max_tokens": state["text"].shape[-2] > cache.max_tokens,
        "model": _sizes(state["text"]) != _sizes(cache.text[:, :, 0], ranks)
        or _sizes(state["frames"]) != _sizes(cache.frames[:, :, 0], ranks)
        or state["frames"].shape[-2] != used * cache.patches,
        "vocabulary": state["seen"].shape != sampler.in_context.shape[1:],
    }
    mismatches = [name for name, value in wrong.items() if value]
    if mismatches:
        raise ValueError(f"the saved session does not fit this engine: other {mismatches[0]}")


def _sizes(slot_kv: Tensor, ranks: int = 1) -> tuple[int, int, int]:
    """Layers, KV heads (of all ranks) and their width of a slot's keys and values `[layers, 2, KV
    heads, L, D]`."""
    layers, _, heads, _, width = slot_kv.shape
    return layers, heads * ranks, width
