"""What a run that goes on does otherwise than before is listed; other sources are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from moss_train.compose import load_config
from moss_train.config import Config, ConfigError, to_dict
from moss_train.resume import changed_fields, check_sources, check_stage


def composed(*overrides: str) -> Config:
    return load_config("pt2", model="toy", overrides=["run.dir=runs/a", *overrides])


BEFORE = to_dict(composed())


def test_every_changed_field_has_a_line():
    now = composed(
        "run.dir=runs/b", "optimizer.lr=0.5", "trainer.steps=9", "data.root=/x",
        "stage.train=[projector.*]", "optimizer.lr_multipliers={vision.*: 0.1}",
        "data.eval_sources=[]",
    )  # fmt: skip
    train = "pt2/train"
    assert list(changed_fields(now, BEFORE)) == [
        "stage.train=['projector.*'] (was ['*'])",
        "data.root=/x (was toy_world)",
        "data.tokenizer=/x/tokenizer (was toy_world/tokenizer)",
        f"data.sources[toy-text].path=/x/{train}/text (was toy_world/{train}/text)",
        f"data.sources[toy-image].path=/x/{train}/image (was toy_world/{train}/image)",
        f"data.sources[toy-video].path=/x/{train}/video (was toy_world/{train}/video)",
        "optimizer.lr=0.5 (was None)",
        "optimizer.lr_multipliers={'vision.*': 0.1} (was None)",
        "trainer.steps=9 (was None)",
    ]
    assert list(changed_fields(composed(), BEFORE)) == []


def test_data_streams_go_on_with_their_sources_alone():
    checkpoint = Path("runs/a/checkpoints/step_00000004")
    check_sources(composed("data.root=/moved"), BEFORE, checkpoint)
    with pytest.raises(ConfigError) as caught:
        check_sources(composed("stage.mixture.text=0", "data.shuffle_buffer=7"), BEFORE, checkpoint)
    assert caught.value.problems == [
        "data.sources, with a share in stage.mixture: toy-image, toy-video: the checkpoint "
        f"{checkpoint} is in the middle of toy-text, toy-image, toy-video: give the same, or start "
        "a new run from its weights (init_from)",
        f"data.shuffle_buffer=7: the checkpoint {checkpoint} has 100",
    ]


def test_another_stage_is_not_the_rest_of_this_one():
    checkpoint = Path("runs/a/checkpoints/step_00000004")
    check_stage(
        composed("stage.lr=1", "trainer.steps=9", "data.global_batch=8"), BEFORE, checkpoint
    )
    with pytest.raises(ConfigError) as caught:
        check_stage(composed("stage.train=[projector.*]", "model.dtype=bf16"), BEFORE, checkpoint)
    assert caught.value.problems == [
        f"stage.train=['projector.*']: the checkpoint {checkpoint} has ['*']",
        f"model.dtype=bf16: the checkpoint {checkpoint} has fp32",
        f"trainer.resume=auto: a new run may start from its weights (init_from={checkpoint}, "
        "another run.dir)",
    ]
