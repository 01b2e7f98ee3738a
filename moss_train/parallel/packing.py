"""Which samples of a step share a microbatch."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.batch import EncodedSample


@dataclass(frozen=True)
class Bounds:
    """Limits on a microbatch, and on the number of them in a step.

    samples, tokens, frames: at most so many, unless one sample alone has more; None for no bound.
    least: at least so many microbatches, where there are as many samples.
    multiple: microbatches of a step are a multiple of this.
    """

    samples: int | None = None
    tokens: int | None = None
    frames: int | None = None
    least: int = 1
    multiple: int = 1

    def fewest(self, samples: list[EncodedSample]) -> int:
        """Microbatches that these samples (at least `multiple`) need, however well they fit."""
        needed = max(
            self.least,
            _parts(len(samples), self.samples),
            _parts(sum(len(sample.tokens) for sample in samples), self.tokens),
            _parts(sum(len(sample.frames) for sample in samples), self.frames),
        )
        most = len(samples) // self.multiple  # no microbatch can be empty
        return min(_parts(needed, self.multiple), most) * self.multiple


def _parts(whole: int, bound: int | None) -> int:
    return 1 if bound is None else -(-whole // bound)


@dataclass
class _Microbatch:
    samples: list[EncodedSample] = field(default_factory=list)
    tokens: int = 0
    frames: int = 0

    def fits(self, sample: EncodedSample, bounds: Bounds) -> bool:
        """Whether the bounds hold with `sample`, too."""
        if not self.samples:
            return True
        sums = len(self.samples), self.tokens, self.frames
        more = 1, len(sample.tokens), len(sample.frames)
        limits = bounds.samples, bounds.tokens, bounds.frames
        return all(
            limit is None or own + new <= limit
            for own, new, limit in zip(sums, more, limits, strict=True)
        )

    def add(self, sample: EncodedSample) -> None:
        self.samples.append(sample)
        self.tokens += len(sample.tokens)
        self.frames += len(sample.frames)


def pack(samples: list[EncodedSample], bounds: Bounds) -> list[list[EncodedSample]]:
    """Packs the samples of a step into as few microbatches as `bounds` allow, about equally long.

    Longest first, each to the microbatch with the fewest tokens so far that may take it.

    Args:
        samples: at least `bounds.multiple`.
    """
    ordered = sorted(samples, key=lambda sample: len(sample.tokens), reverse=True)
    count = bounds.fewest(samples)
    while True:
        microbatches = _assign(ordered, bounds, count)
        if microbatches is not None:
            return [microbatch.samples for microbatch in microbatches]
        count += bounds.multiple


def _assign(ordered: list[EncodedSample], bounds: Bounds, count: int) -> list[_Microbatch] | None:
    """Assigns each sample to one of `count` microbatches; None where a bound does not hold and more
    microbatches would help.
    """
    microbatches = [_Microbatch() for _ in range(count)]
    last = count + bounds.multiple > len(ordered)  # no microbatch can be empty
    for sample in ordered:
        free = [own for own in microbatches if last or own.fits(sample, bounds)]
        if not free:
            return None
        min(free, key=lambda own: own.tokens).add(sample)
    return microbatches
