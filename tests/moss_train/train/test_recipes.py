"""What stages do otherwise on the toy world: conf/recipe, chosen by data and stage."""

from __future__ import annotations

import pytest

from data_pipeline.toy.build import STAGES
from moss_train.compose import load_config


@pytest.mark.parametrize("stage", STAGES)
def test_each_toy_stage_reads_its_own_sources(stage: str) -> None:
    config = load_config(stage, data="toy", **{"data.root": "world"})
    paths = [source.path for source in config.data.sources]
    assert paths == [f"world/{stage}/train/{m}" for m in ("text", "image", "video")]
    assert config.stage.name == stage
    assert config.steps == {"pt1": 700, "pt2": 1000, "sft": 2000, "realtime_sft": 1400}[stage]
    assert config.lr == pytest.approx(1.4e-3 if stage == "pt1" else 1e-3)


def test_toy_pt1_trains_all_parts_and_full_scale_the_projector_alone() -> None:
    assert load_config("pt1", data="toy").stage.also == ["vision.*", "decoder.*"]
    shards = load_config("pt1", data="shards", overrides=["data.tokenizer=t"])
    assert shards.stage.also == []
    assert shards.stage.train == ["projector.*"]
    assert shards.stage.samples == 15_100_000


def test_overrides_win_over_recipes() -> None:
    config = load_config("sft", data="toy", overrides=["data.samples=160", "stage.lr=1e-5"])
    assert config.steps == 10
    assert config.stage.lr == 1e-5
