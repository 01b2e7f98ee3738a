"""A folder that is not what was asked for is told apart, with what to do."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from moss_train.convert.folders import why_no_checkpoint
from moss_train.convert.source import ConversionError
from moss_train.convert.to_hf import ToHf, convert_megatron
from tests.moss_train.convert.sources import mllama_weights, save_folder
from tests.moss_train.convert.test_strangers import MERGE, convert, refusal
from tests.torchrun import REPO


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ([], "no complete checkpoint there: give a run folder"),
        (["config.json", "model.safetensors"], "hf-to-megatron FOLDER OUT"),
        (["adapter_config.json", "config.json"], f"is an adapter of a model: .*{MERGE}"),
        (["global_step10/mp_rank_00_model_states.pt"], "zero_to_fp32.py"),
        (["checkpoints/step_00000010/run.json"], "no complete checkpoint there"),
        (["run.json", ".metadata"], "without its complete.json: it was not written to its end"),
    ],
)
def test_what_init_from_cannot_start_from_is_told(files, named, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    assert re.search(named, why_no_checkpoint(tmp_path))


def test_a_name_of_a_hub_is_no_folder():
    said = why_no_checkpoint(Path("meta-llama/Llama-3.2-11B-Vision"))
    assert said.startswith("does not exist: give a run folder (a hub's model is fetched and")


def test_a_damaged_checkpoint_is_no_missing_one(tmp_path):
    made = tmp_path / "out"
    convert(save_folder(tmp_path / "source", mllama_weights()), made)
    file = made / "__0_0.distcp"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(ConversionError) as caught:
        convert_megatron(ToHf(made, tmp_path / "hf", REPO / "inference/hf"))
    assert str(caught.value) == (
        f"{made}: is a checkpoint that is damaged: __0_0.distcp has {size - 100} bytes, not {size}"
    )


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.safetensors"])
def test_weights_of_another_name_are_told(name, tmp_path):
    source = save_folder(tmp_path / "source", mllama_weights())
    (source / "model.safetensors").rename(source / name)
    assert refusal(source, tmp_path / "out") == (
        f"{source}: holds {name}, but no model.safetensors: rename what is the whole model"
    )


def test_parts_without_an_index_are_told_beside_other_files(tmp_path):
    source = save_folder(tmp_path / "source", mllama_weights())
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    (source / "extra.safetensors").write_bytes(b"")
    assert refusal(source, tmp_path / "out") == (
        f"{source}: holds model-00001-of-00002.safetensors, but no model.safetensors.index.json: "
        "fetch it"
    )
