"""Where a run stands in its data: a few counters, the same for any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """A folder of indexed shards. `weight`: its share of the samples, relative to other sources."""

    name: str
    path: str
    modality: Literal["text", "image", "video"]
    weight: float


@dataclass(frozen=True)
class SourceState:
    """A source in the order of a run.

    share: of the run's samples, 0..1. samples: of an epoch. shards: a digest of their names and
    counts. taken: samples that the run has taken from it so far.
    """

    share: float
    samples: int
    shards: str
    taken: int = 0


@dataclass(frozen=True)
class OrderState:
    """What decides the order of samples, and how far a run has come in it."""

    seed: int
    shuffle_window: int
    sources: dict[str, SourceState]  # by name, sorted
    samples: int = 0  # taken so far, of all sources

    def to_dict(self) -> dict[str, Any]:
        """The state as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> OrderState:
        """Raises ValueError for what is not from `to_dict`."""
        try:
            sources = {name: SourceState(**state) for name, state in plain["sources"].items()}
            return cls(**{**plain, "sources": sources})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the position in the data cannot be read: {error!r}") from None


def start(
    sources: Sequence[Source],
    shards: Mapping[str, Mapping[str, int]],
    seed: int,
    shuffle_window: int,
) -> OrderState:
    """The beginning of the order of `sources`.

    shards: of each source by its name: samples of each shard, as in `training_shards`.
    """
    total = sum(source.weight for source in sources)
    states = {}
    for source in sorted(sources, key=lambda source: source.name):
        counts = shards[source.name]
        digest = blake2b(repr(sorted(counts.items())).encode(), digest_size=8).hexdigest()
        states[source.name] = SourceState(source.weight / total, sum(counts.values()), digest)
    return OrderState(seed, shuffle_window, states)


def differences(saved: OrderState, now: OrderState) -> Iterator[str]:
    """A line for each thing that makes the order of `now` another than that of `saved`."""
    for field in ("seed", "shuffle_window"):
        mine, theirs = getattr(now, field), getattr(saved, field)
        if mine != theirs:
            yield f"{field} {mine} (was {theirs})"
    for name in sorted(saved.sources.keys() | now.sources.keys()):
        before, after = saved.sources.get(name), now.sources.get(name)
        if before is None or after is None:
            yield f"source {name} is {'new' if before is None else 'gone'}"
            continue
        if not _same_data(before, after):
            yield f"source {name} has other shards ({after.samples} samples, was {before.samples})"
        if abs(before.share - after.share) > 1e-9:
            yield f"source {name} has {after.share:.2%} of the samples (was {before.share:.2%})"


def go_on(saved: OrderState, now: OrderState) -> OrderState:
    """`now`, from where `saved` stands.

    A source that is new or has other shards begins with its first epoch; so do all where the seed
    or the window is another.
    """
    same = (saved.seed, saved.shuffle_window) == (now.seed, now.shuffle_window)
    sources = {}
    for name, state in now.sources.items():
        before = saved.sources.get(name)
        keeps = same and before is not None and _same_data(before, state)
        sources[name] = replace(state, taken=before.taken if before and keeps else 0)
    return replace(now, sources=sources, samples=saved.samples)


def _same_data(one: SourceState, other: SourceState) -> bool:
    return (one.samples, one.shards) == (other.samples, other.shards)
