"""How many frames a tower that trains encodes at once, and what they keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_pipeline.fields import wrong_values
from moss_train import hardware
from moss_train.config import Config, ParallelConfig
from moss_train.model_config import ProjectorConfig
from moss_train.train import chunk_size
from moss_train.train.chunk_size import (
    fitting_chunk,
    frames_per_chunk,
    kept_by_frame,
    kept_by_projector,
    moments_to_come,
)
from moss_train.train.optimizer import make_train_state
from moss_train.train.param_groups import freeze
from moss_train.validate import _without_effect
from tests.kept import Kept
from tests.moss_train.model.build import preset, random_model


def test_chunks_fill_half_of_the_free_memory():
    got = [fitting_chunk(free, 10) for free in (-5, 0, 19, 20, 60, 80, 159, 160, 320, 10**6)]
    assert got == [1, 1, 1, 1, 2, 4, 4, 8, 16, 16]


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_layers_keep_what_is_predicted(groups, recompute):
    """What six local and three global layers more keep of five frames."""
    kept, predicted, frames = [], [], 5
    for layers in (2, 8):
        model = preset("tiny", dtype="fp32")
        vision = model.vision = replace(model.vision, hidden_size=128, mlp_size=512)
        vision.num_layers, vision.num_global_layers = layers, layers // 2
        vision.intermediate_layers = [1]
        config = Config(model=model, parallel=ParallelConfig(recompute=recompute))
        config.data.max_tiles = 1
        built = random_model(model, groups, recompute=recompute)
        counter = Kept(built.encoder.parameters())
        with counter:
            pixels = torch.randn(frames, 1, 3, vision.image_size, vision.image_size)
            states = built.encoder.vision(pixels, torch.ones(frames, dtype=torch.long))
            kept.append(counter.now)
        assert states[0].requires_grad
        predicted.append(frames * kept_by_frame(config))
    assert kept[1] - kept[0] == pytest.approx(predicted[1] - predicted[0], rel=0.06)
    assert predicted[1] < kept[1] < 1.15 * predicted[1]


@pytest.mark.parametrize("pool", ["average", "channel_fusion", "none"])
def test_a_projector_keeps_what_is_predicted(groups, pool):
    model, frames = preset("tiny", dtype="fp32"), 40
    model.projector = ProjectorConfig(pool, 2)
    config = Config(model=model)
    config.data.max_tiles = 2
    encoder = random_model(model, groups).encoder
    pixels, ids = torch.randn(frames, 2, 3, 56, 56), torch.full((frames,), 2)
    with torch.no_grad():
        features = encoder.features(pixels, ids)
    kept = Kept(encoder.parameters())
    with kept:
        states = encoder.projector(features)
        assert states.requires_grad
    assert kept.now == pytest.approx(frames * kept_by_projector(config), rel=0.02)


def test_the_largest_model_s_frames_are_those_of_the_docs():
    model = preset("11b", dtype="bf16")
    sizes = {}
    for recompute in ("none", "selective"):
        config = Config(model=model, parallel=ParallelConfig(recompute=recompute))
        config.data.max_tiles = 1
        sizes[recompute] = kept_by_frame(config) / 1e9
    assert sizes == pytest.approx({"none": 2.7, "selective": 1.7}, rel=0.04)


def test_chunks_are_sized_on_a_gpu_after_all_that_is_to_come(groups, monkeypatch):
    """Of the first update, the moments of all that trains."""
    model = preset("tiny", dtype="fp32")
    model.vision.frames_per_chunk = None
    built = random_model(model, groups)
    config = Config(model=model)
    config.trainer.steps = 2
    state = make_train_state(built, config, freeze(built, ["vision.*"]))
    trained = sum(p.numel() for _, p in built.named_parameters() if p.requires_grad)
    assert moments_to_come(state) == pytest.approx(8 * trained, rel=0.02)  # and some padding
    assert frames_per_chunk(config, built, state) == 16  # on a CPU

    # The GPU's part alone is made up: how much of its memory is free.
    free = 2 * 5 * kept_by_frame(config) + moments_to_come(state)
    monkeypatch.setattr(chunk_size, "hardware", GPU(free))
    assert frames_per_chunk(config, built, state) == 4
    config.model.vision.kept_frames = 3  # a chunk is kept as a whole
    assert frames_per_chunk(config, built, state) == 2
    config.model.vision.kept_frames = 40
    assert frames_per_chunk(config, built, state) == 4
    config.trainer.deterministic = True
    assert frames_per_chunk(config, built, state) == 16
    config.model.vision.kept_frames = 12
    assert frames_per_chunk(config, built, state) == 8
    config.model.vision.frames_per_chunk = 7
    assert frames_per_chunk(config, built, state) == 7


@pytest.mark.parametrize(
    ("fields", "train", "refusal"),
    [
        ({"kept_frames": 8}, ["vision.*"], None),
        ({"kept_frames": 8, "frames_per_chunk": 8}, ["vision.global_layers.*"], None),
        ({"kept_frames": 0, "recompute": False}, ["projector.*"], None),
        ({"kept_frames": 8}, ["projector.*", "decoder.*"], "the tower is frozen, and keeps "
         "nothing: leave it at 0, or train vision.*"),
        ({"kept_frames": 8, "recompute": False}, ["*"], "model.vision.recompute=false keeps all "
         "frames: leave it at 0"),
        ({"kept_frames": 8, "frames_per_chunk": 9}, ["*"], "a chunk is kept as a whole, and has "
         "model.vision.frames_per_chunk=9 frames: give as many, or make the chunks smaller"),
    ],
)  # fmt: skip
def test_frames_that_cannot_be_kept_are_refused(fields, train, refusal):
    config = Config(model=preset("tiny"))
    config.model.vision = replace(config.model.vision, **fields)
    config.stage.train = train
    expected = [] if refusal is None else [f"model.vision.kept_frames=8: {refusal}"]
    assert list(_without_effect(config)) == expected
    config.model.vision.kept_frames = -1
    (wrong,) = wrong_values(config)
    assert wrong.startswith("model.vision.kept_frames=-1: must be")


class GPU:
    """What moss_train/hardware.py would say of one; tensors stay on the CPU."""

    DTYPES = hardware.DTYPES

    def __init__(self, free: int):
        self.free = free

    def on_accelerator(self) -> bool:
        return True

    def free_memory(self) -> int:
        return self.free
