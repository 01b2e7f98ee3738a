"""Which samples of a step share a microbatch."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.batch import EncodedSample


@dataclass(frozen=True)
class Bounds:
    """Limits on a microbatch, and on the number of them in a step.

    samples: at most so many. tokens, frames: at most so many, unless one sample alone has more;
    None for no bound. multiple: microbatches of a step are a multiple of this.
    """

    samples: int
    tokens: int | None = None
    frames: int | None = None
    multiple: int = 1

    def hold(self, samples: list[EncodedSample]) -> bool:
        """Whether these samples may share a microbatch."""
        if len(samples) <= 1:
            return True
        tokens = sum(len(sample.tokens) for sample in samples)
        frames = sum(len(sample.frames) for sample in samples)
        return (
            len(samples) <= self.samples
            and (self.tokens is None or tokens <= self.tokens)
            and (self.frames is None or frames <= self.frames)
        )


def pack(samples: list[EncodedSample], bounds: Bounds) -> list[list[EncodedSample]]:
    """Packs the samples of a step into as few microbatches as `bounds` allow, about equally long.

    Longest first, each to the microbatch with the fewest tokens so far that may take it.
    """
    ordered = sorted(samples, key=lambda sample: len(sample.tokens), reverse=True)
    count = -(-len(samples) // (bounds.samples * bounds.multiple)) * bounds.multiple
    while True:
        microbatches = _assign(ordered, bounds, count)
        if microbatches is not None:
            return microbatches
        count += bounds.multiple


def _assign(
    ordered: list[EncodedSample], bounds: Bounds, count: int
) -> list[list[EncodedSample]] | None:
    """Assigns each sample to one of `count` microbatches; None where a bound does not hold and more
    microbatches would help.
    """
    microbatches: list[list[EncodedSample]] = [[] for _ in range(count)]
    last = count + bounds.multiple > len(ordered)  # no microbatch can be empty
    for sample in ordered:
        free = [samples for samples in microbatches if last or bounds.hold([*samples, sample])]
        if not free:
            return None
        min(free, key=lambda samples: sum(len(s.tokens) for s in samples)).append(sample)
    return microbatches
