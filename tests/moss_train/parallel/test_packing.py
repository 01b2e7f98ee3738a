"""Which samples share a microbatch."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.batch import EncodedSample
from moss_train.parallel.packing import Bounds, pack


def sample(tokens: int, frames: int = 0) -> EncodedSample:
    zeros = torch.zeros(tokens, dtype=torch.long)
    empty = torch.zeros(frames, dtype=torch.long)
    pixels = torch.zeros(frames, 1, 3, 2, 2, dtype=torch.uint8)
    return EncodedSample(f"{tokens}-{frames}", zeros, zeros, pixels, empty, empty)


def lengths(microbatches: list[list[EncodedSample]]) -> list[list[int]]:
    return [[len(s.tokens) for s in samples] for samples in microbatches]


def test_microbatches_are_about_equally_long():
    samples = [sample(n) for n in (10, 90, 20, 80, 30, 70)]
    assert lengths(pack(samples, Bounds(2))) == [[90, 10], [80, 20], [70, 30]]


def test_a_bound_on_frames_makes_more_microbatches():
    samples = [sample(10, frames) for frames in (6, 6, 1, 1)]
    assert len(pack(samples, Bounds(4))) == 1
    microbatches = pack(samples, Bounds(4, frames=7))
    assert sorted(sorted(len(s.frames) for s in samples) for samples in microbatches) == [
        [1, 6],
        [1, 6],
    ]


@pytest.mark.parametrize("bounds", [Bounds(8, tokens=50), Bounds(8, frames=3)])
def test_a_sample_over_the_bound_is_alone_and_all_others_keep_it(bounds):
    samples = [sample(100, 9), sample(40, 2), sample(9, 1), sample(30, 3), sample(8, 0)]
    microbatches = pack(samples, bounds)
    assert sorted(s.key for batch in microbatches for s in batch) == sorted(s.key for s in samples)
    for batch in microbatches:
        assert batch == [samples[0]] or bounds.hold(batch)
    assert [samples[0]] in microbatches


def test_the_number_of_microbatches_stays_a_multiple():
    samples = [sample(10, 2) for _ in range(8)]
    assert len(pack(samples, Bounds(4, multiple=2))) == 2
    assert len(pack(samples, Bounds(4, frames=4, multiple=4))) == 4
    # No microbatch can be empty: where the multiple leaves no room, the bound gives way.
    assert len(pack(samples[:6], Bounds(3, frames=2, multiple=4))) == 4
