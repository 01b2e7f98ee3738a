"""A random model that reads the toy world, and held-out items of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.toy.build import ToyConfig, build_toy
from moss_train.config import Config, RunConfig, StageConfig
from moss_train.data_config import DataConfig
from moss_train.evaluate.items import Item, read_shards
from moss_train.evaluate.model import TrainedModel
from tests.moss_train.model.build import preset, random_model


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    stages = ("pt2", "sft", "realtime_sft")
    build_toy(out, ToyConfig(train=40, heldout=10, stages=stages))
    return out


@pytest.fixture(scope="module")
def model(toy: Path, groups) -> TrainedModel:
    architecture = preset("tiny")
    architecture = replace(architecture, text=replace(architecture.text, vocab_size=512))
    config = Config(
        run=RunConfig(dir="none"),
        stage=StageConfig(name="sft", prompt="chat", video_fps=1.0, video_min_frames=1),
        model=architecture,
        data=DataConfig(root=str(toy), tokenizer=str(toy / "tokenizer"), sequence_length=256),
    )
    return TrainedModel(config, random_model(architecture, groups), Path("none"), 0)


@pytest.fixture(scope="module")
def questions(model: TrainedModel, toy: Path) -> list[Item]:
    """Six about clips, two about pictures, two about texts."""
    return [
        item
        for modality, count in (("video", 6), ("image", 2), ("text", 2))
        for item in read_shards(toy / "sft/heldout" / modality, modality, model.encoder, count)
    ]


@pytest.fixture(scope="module")
def live(model: TrainedModel, toy: Path) -> list[Item]:
    """Streams, half of them with a question in the middle."""
    clips = read_shards(toy / "realtime_sft/heldout/video", "live", model.encoder)
    return [item for item in clips if item.sample.kind == "realtime"]
