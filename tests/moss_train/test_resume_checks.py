"""What a run that goes on does otherwise than before is listed; other data are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.index import prepare_index
from data_pipeline.loader.state import start
from data_pipeline.shards import training_shards, write_shards
from moss_train.compose import load_config
from moss_train.config import Config, ConfigError, to_dict
from moss_train.data_config import MODALITIES
from moss_train.resume import (
    changed_fields,
    check_architecture,
    check_length,
    check_order,
    check_stage,
)
from moss_train.sources import mixed_sources, shared_sources


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


def test_weights_are_for_one_kind_of_positions():
    """No parameter shows whether keys and queries of frames are rotated."""
    checkpoint = Path("imported")
    check_architecture(composed(), BEFORE, checkpoint)
    with pytest.raises(ConfigError) as caught:
        check_architecture(composed("model.cross_attention_rope=false"), BEFORE, checkpoint)
    assert caught.value.problems == [
        "model.cross_attention_rope=False: the checkpoint imported has True"
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of the toy world, with three texts each."""
    root = tmp_path_factory.mktemp("toy")
    for modality in MODALITIES:
        folder = root / "pt2/train" / modality
        write_shards(({"__key__": f"{i}", "json": {"i": i}} for i in range(3)), folder)
        prepare_index(folder)
    return root


def run_json(config: Config) -> dict[str, object]:
    """What a checkpoint of `config` says of its data."""
    sources = mixed_sources(config)
    counts = {source.name: training_shards(source.path) for source in sources}
    state = start(sources, counts, config.trainer.seed, config.data.shuffle_window)
    return {"data_order": json.loads(json.dumps(state.to_dict()))}


def test_a_run_goes_on_with_the_data_that_it_had(shards: Path, tmp_path: Path):
    checkpoint = Path("runs/a/checkpoints/step_00000004")
    saved = run_json(composed(f"data.root={shards}"))
    moved = shutil.copytree(shards, tmp_path / "moved")
    check_order(composed(f"data.root={moved}", "data.workers=7"), saved, checkpoint)

    others = (
        f"data.root={shards}", "stage.mixture.text=0", "data.shuffle_window=7", "trainer.seed=9",
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check_order(composed(*others), saved, checkpoint)
    assert caught.value.problems == [
        f"trainer.resume_data=exact: {checkpoint} has other data: seed 9 (was 1234); "
        "shuffle_window 7 (was 100); source toy-image has 27.78% of the samples (was 25.00%); "
        "source toy-text is gone; source toy-video has 72.22% of the samples (was 65.00%): give "
        "what it has, or take trainer.resume_data=fresh: what has changed begins anew"
    ]
    check_order(composed(*others, "trainer.resume_data=fresh"), saved, checkpoint)


def test_a_checkpoint_that_knows_no_order_for_all_layouts_is_refused(shards: Path):
    now = f"data.root={shards}"
    with pytest.raises(ConfigError, match="saved by an earlier version, in an order that cannot"):
        check_order(composed(now), {}, Path("old"))
    check_order(composed(now, "trainer.resume_data=fresh"), {}, Path("old"))


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


def test_a_run_with_another_batch_says_how_many_steps_read_its_remaining_samples():
    """8 steps of 4 have read 32 of 64 samples. The other 32 are 4 steps of 8: 64 / 8 steps in all
    would be done, with half of the samples."""
    checkpoint, length = Path("runs/a/checkpoints/step_00000008"), "data.samples=64"
    saved = {"step": 8, "samples": 32}
    check_length(composed(length, "data.global_batch=4"), saved, checkpoint)
    check_length(composed("trainer.steps=12", "data.global_batch=8"), saved, checkpoint)
    with pytest.raises(ConfigError) as caught:
        check_length(composed(length, "data.global_batch=8"), saved, checkpoint)
    assert caught.value.problems == [
        f"data.global_batch=8: the 8 steps of {checkpoint}, of another batch size, have read 32 of "
        "data.samples=64 samples: write trainer.steps=12, which reads the remaining ones"
    ]


def test_a_source_that_trains_and_validates_is_told(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path)
    sources = f"data.sources=[{{name: a, path: {tmp_path}, modality: text}}]"
    held = f"data.eval_sources=[{{name: x, path: {tmp_path}/link/, modality: text}}]"
    shares = ["stage.mixture.text=1", "stage.mixture.image=0", "stage.mixture.video=0"]
    config = composed(sources, held, *shares, "trainer.eval_every=2")
    assert shared_sources(config) == [
        f"data.eval_sources[x].path={tmp_path}/link/: the run also trains on it, as "
        "data.sources[a]: its loss is not that of unseen samples"
    ]
    assert shared_sources(composed(sources, held, *shares)) == []
    assert shared_sources(composed("trainer.eval_every=2")) == []
