"""Which samples share a microbatch, and that it does not matter to the loss."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from data_pipeline.batch import EncodedSample
from moss_train.compose import load_config
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
    assert lengths(pack(samples, Bounds(tokens=160))) == [[90, 30, 20, 10], [80, 70]]


def test_there_are_hardly_more_microbatches_than_their_tokens_need():
    texts = [sample(512) for _ in range(64)]
    assert lengths(pack(texts, Bounds(tokens=4096))) == [[512] * 8] * 8
    mixed = [sample(100 + 37 * n % 400) for n in range(300)]
    tokens = sum(len(s.tokens) for s in mixed)
    microbatches = pack(mixed, Bounds(tokens=4096))
    assert tokens / 4096 > 21.8
    assert len(microbatches) <= 23
    assert max(sum(own) for own in lengths(microbatches)) <= 4096


def test_a_bound_on_frames_makes_more_microbatches():
    samples = [sample(10, frames) for frames in (6, 6, 1, 1)]
    assert len(pack(samples, Bounds(4))) == 1
    microbatches = pack(samples, Bounds(4, frames=7))
    assert sorted(sorted(len(s.frames) for s in samples) for samples in microbatches) == [
        [1, 6],
        [1, 6],
    ]


@pytest.mark.parametrize(("tokens", "frames"), [(50, None), (None, 3)])
def test_a_sample_over_the_bound_is_alone_and_all_others_keep_it(tokens, frames):
    samples = [sample(100, 9), sample(40, 2), sample(9, 1), sample(30, 3), sample(8, 0)]
    microbatches = pack(samples, Bounds(8, tokens, frames))
    assert sorted(s.key for batch in microbatches for s in batch) == sorted(s.key for s in samples)
    assert [samples[0]] in microbatches
    for batch in microbatches:
        if batch != [samples[0]]:
            assert tokens is None or sum(len(s.tokens) for s in batch) <= tokens
            assert frames is None or sum(len(s.frames) for s in batch) <= frames


def test_the_number_of_microbatches_stays_a_multiple():
    samples = [sample(10, 2) for _ in range(8)]
    assert len(pack(samples, Bounds(4, multiple=2))) == 2
    assert len(pack(samples, Bounds(4, frames=4, multiple=4))) == 4
    # No microbatch can be empty: where the multiple leaves no room, the bound gives way.
    assert len(pack(samples[:6], Bounds(3, frames=2, multiple=4))) == 4


def test_every_stage_of_a_pipeline_gets_a_microbatch_where_there_are_as_many_samples():
    samples = [sample(10) for _ in range(8)]
    assert len(pack(samples, Bounds(tokens=4096))) == 1
    assert len(pack(samples, Bounds(tokens=4096, least=3))) == 3
    assert len(pack(samples, Bounds(tokens=4096, least=3, multiple=2))) == 4
    assert len(pack(samples[:2], Bounds(tokens=4096, least=3))) == 2


@pytest.mark.parametrize(
    ("overrides", "tokens", "frames"),
    [
        (["stage=pt2"], 4096, 256),
        (["stage=sft"], 8192, 256),  # sequences of 8,192 tokens
        (["stage=pt1", "data.sequence_length=512", "data.max_tiles=4"], 4096, 64),
        (["stage=pt1", "stage.video_max_frames=300"], 4096, 300),
        (["data.max_tokens_per_batch=1000", "data.max_frames_per_batch=9"], 1000, 9),
    ],
)
def test_a_microbatch_holds_4096_tokens_or_the_longest_sequence(overrides, tokens, frames):
    given = ["model=11b", "data=shards", "data.tokenizer=x", "run.dir=x", *overrides]
    config = load_config(overrides=given)
    assert (config.microbatch_tokens, config.microbatch_frames) == (tokens, frames)
    assert config.data.micro_batch is None


PACKINGS = {
    "one by one": Bounds(samples=1),
    "in pairs": Bounds(samples=2),
    "90 tokens": Bounds(tokens=90),
    "6 frames": Bounds(frames=6),
    "two microbatches": Bounds(least=2),
}


@pytest.fixture(scope="module")
def step(groups) -> Any:
    """A step of the small model, its loss weighted as real-time training weighs it."""
    from moss_train.config import Config, ParallelConfig, TrainerConfig
    from moss_train.convert.random_init import random_reader
    from moss_train.convert.weights import fill
    from moss_train.model.moss_video import MossVideo
    from moss_train.train.guard import Guard
    from moss_train.train.optimizer import make_train_state
    from moss_train.train.param_groups import freeze
    from moss_train.train.step import TrainStep
    from tests.workers.matrix import small_model

    config = Config(model=small_model("fp32"), trainer=TrainerConfig(steps=9))
    config.stage.silence_weight, config.stage.z_loss = 0.1, 1e-4
    model = MossVideo(config.model, ParallelConfig(), groups)
    fill(model, random_reader(config.model, seed=8))
    state = make_train_state(model, config, freeze(model, ["*"]))
    return TrainStep(config, model, state, silence_id=11, guard=Guard(None, [], 0))


def run(step: Any, bounds: Bounds) -> tuple[int, float, torch.Tensor]:
    """Microbatches, loss and gradient of the same eight samples of all kinds."""
    from moss_train.parallel.distribute import read_step
    from tests.workers.matrix import microbatches

    groups = step.model.groups
    batches = islice(microbatches("mixed", 0, 4, 1), 8)
    batch = read_step(batches, 8, bounds, 8, (1, 3, 56, 56), groups, 1)
    (loss,), _ = step.forward_backward(batch)
    gradients: list[Any] = [p.main_grad.flatten() for _, p in step.model.named_parameters()]
    return len(batch.microbatches), float(loss), torch.cat(gradients).double()


@pytest.mark.parametrize("name", PACKINGS)
def test_the_loss_of_a_global_batch_does_not_depend_on_how_it_is_packed(step, name):
    _, expected, gradient = run(step, Bounds())
    count, loss, ours = run(step, PACKINGS[name])
    assert count > 1
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (ours - gradient).norm() <= 1e-5 * gradient.norm()
    assert gradient.norm() > 0
