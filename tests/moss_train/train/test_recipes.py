"""What stages do otherwise on the toy world: conf/recipe, chosen by data and stage."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from data_pipeline.toy.build import STAGES
from moss_train.config import Config, from_hydra
from tests.torchrun import REPO


def composed(*overrides: str) -> Config:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return from_hydra(compose("config", [*overrides, "run.dir=runs/x"]))


@pytest.mark.parametrize("stage", STAGES)
def test_each_toy_stage_reads_its_own_sources(stage: str) -> None:
    config = composed(f"stage={stage}", "data=toy", "data.root=world")
    paths = [source.path for source in config.data.sources]
    assert paths == [f"world/{stage}/train/{m}" for m in ("text", "image", "video")]
    assert config.stage.name == stage
    assert config.steps == {"pt1": 700, "pt2": 800, "sft": 1400, "realtime_sft": 550}[stage]
    assert config.lr == pytest.approx(1.4e-3 if stage == "pt1" else 1e-3)


def test_toy_pt1_trains_all_parts_and_full_scale_the_projector_alone() -> None:
    assert composed("stage=pt1", "data=toy").stage.also == ["vision.*", "decoder.*"]
    shards = composed("stage=pt1", "data=shards", "data.tokenizer=t")
    assert shards.stage.also == []
    assert shards.stage.train == ["projector.*"]
    assert shards.stage.samples == 15_100_000


def test_overrides_win_over_recipes() -> None:
    config = composed("stage=sft", "data=toy", "data.samples=160", "stage.lr=1e-5")
    assert config.steps == 10
    assert config.stage.lr == 1e-5
