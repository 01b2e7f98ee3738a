"""A checkpoint's tokenizer travels with it, and every door refuses another one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from data_pipeline.tokenizer_identity import identify
from data_pipeline.tokens import build_toy_tokenizer, load_tokenizer
from inference.engine.load import load_engine
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from moss_train.checkpoint_dir import read_run, write_complete
from moss_train.config import Config, ConfigError, from_dict
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.convert.to_megatron import FromHf, convert_hf
from moss_train.evaluate.exported import ExportedModel
from moss_train.evaluate.model import TrainedModel
from moss_train.log import log
from moss_train.resume import find_resume
from tests.golden.make_mllama import CONFIG
from tests.moss_train.convert.sources import mllama_weights, save_folder
from tests.torchrun import REPO
from tools.verify_checkpoint import main as verify

CODE = REPO / "inference/hf"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A source with a tokenizer, its checkpoint, that one's export, and another tokenizer."""
    out = tmp_path_factory.mktemp("made")
    weights = mllama_weights()
    for name, rows in (("model.embed_tokens", 520), ("lm_head", 512)):
        weights[f"language_model.{name}.weight"] = torch.zeros(rows, 32)
    text = CONFIG["text_config"] | {"vocab_size": 512}
    config = {**CONFIG, "text_config": text, "image_token_index": 512, "pool_mode": "average"}
    source = save_folder(out / "source", weights, {**config, "pool_stride": 2})
    build_toy_tokenizer(source, ["a man walks a dog", "a dog"], 512)
    build_toy_tokenizer(out / "other", ["seven ships sail the seas"], 512)
    convert_hf(FromHf(source, out / "checkpoint"))
    convert_megatron(ToHf(out / "checkpoint", out / "export", CODE))
    return out


@pytest.fixture
def swapped(made, tmp_path) -> Path:
    """The checkpoint and the export, each with the other tokenizer in its folder."""
    for name in ("checkpoint", "export"):
        shutil.copytree(made / name, tmp_path / name)
    for folder in (tmp_path / "checkpoint/tokenizer", tmp_path / "export"):
        shutil.copy(made / "other/tokenizer.json", folder / "tokenizer.json")
    run = json.loads((tmp_path / "checkpoint/run.json").read_text())
    run["config"]["data"]["tokenizer"] = str(tmp_path / "checkpoint/tokenizer")
    save_run(tmp_path / "checkpoint", run)
    return tmp_path


def save_run(checkpoint: Path, run: dict) -> None:
    (checkpoint / "run.json").write_text(json.dumps(run))
    (checkpoint / "complete.json").unlink()
    write_complete(checkpoint)


def export_with(folder: Path, tokenizer: Path | None = None) -> list[str]:
    return convert_megatron(ToHf(folder / "checkpoint", folder / "out", CODE, tokenizer=tokenizer))


LOAD = MossVideoForConditionalGeneration.from_pretrained
DOORS: dict[str, Callable[[Path], object]] = {
    "export": export_with,
    "TrainedModel": lambda folder: TrainedModel.open(folder / "checkpoint", "cpu"),
    "evaluation of an export": lambda folder: ExportedModel.open_with(
        LOAD, folder / "export", "cpu"
    ),
    "import": lambda folder: convert_hf(FromHf(folder / "export", folder / "out")),
}


def test_inference_refuses_another_tokenizer_before_it_loads_weights(made, swapped):
    shutil.rmtree(swapped / "checkpoint")
    (weights,) = (swapped / "export").glob("*.safetensors")
    weights.unlink()
    own, other = identify(made / "source").digest, identify(made / "other").digest
    with pytest.raises(ValueError, match=f"digest {other}, not {own}: other vocabulary"):
        load_engine(swapped / "export")
    (swapped / "export/training.json").write_text('{"tokenizer": {"text": 1}}')
    with pytest.raises(ValueError, match=r"training\.json: tokenizer: cannot be read"):
        load_engine(swapped / "export")


@pytest.mark.parametrize("door", DOORS)
def test_another_tokenizer_in_the_folder_is_refused(made, swapped, door):
    with pytest.raises(ConfigError) as caught:
        DOORS[door](swapped)
    assert not (swapped / "out").exists()
    (line,) = caught.value.problems
    own, other = identify(made / "source").digest, identify(made / "other").digest
    assert f"digest {other}, not {own}: other vocabulary, merges or normalizer" in line


def test_the_tokenizer_of_training_given_by_hand_is_taken(made, swapped):
    export_with(swapped, made / "source")
    exported, trained = (swapped / "out/tokenizer.json", made / "source/tokenizer.json")
    assert exported.read_bytes() == trained.read_bytes()
    with pytest.raises(ConfigError, match="--tokenizer"):
        export_with(made, made / "other")


def test_verify_refuses_an_export_with_another_tokenizer(made, swapped, capsys):
    assert verify(["--hf", str(swapped / "export"), "--megatron", str(made / "checkpoint")]) == 1
    assert f"is not the tokenizer that {made / 'checkpoint'}" in capsys.readouterr().err


def start(made: Path, tokenizer: Path, **more: object) -> Config:
    """A run that starts from the checkpoint."""
    config = from_dict(read_run(made / "checkpoint")["config"])
    config.run.dir, config.data.tokenizer = str(made / "new"), str(tokenizer)
    config.init_from = str(made / "checkpoint")
    for name, value in more.items():
        setattr(config.data, name, value)
    return config


def test_a_run_that_starts_from_weights_says_how_to_change_the_tokenizer(made, tmp_path, caplog):
    other = made / "other"
    with pytest.raises(ConfigError, match=r"data\.new_tokenizer=true") as caught:
        find_resume(start(made, other))
    assert str(caught.value).startswith(f"data.tokenizer={other}: is not the tokenizer that ")
    assert find_resume(start(made, made / "source")) is None
    assert find_resume(start(made, other, new_tokenizer=True)) is None


def test_more_added_tokens_are_taken_from_weights_with_a_warning(made, tmp_path, caplog):
    tokenizer = load_tokenizer(made / "source")
    tokenizer.add_special_tokens([AddedToken("<|tool|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING, log.name):
        find_resume(start(made, tmp_path))
    assert "other added tokens, 514 tokens, not 513): it is taken" in caplog.text


def test_what_tokens_before_a_frame_saw_in_training_is_told(made, caplog):
    config = start(made, made / "source")
    now = {"zero": "attend_all", "attend_all": "zero"}[config.model.tokens_before_first_frame]
    before, config.model.tokens_before_first_frame = config.model.tokens_before_first_frame, now
    with caplog.at_level(logging.WARNING, log.name):
        assert find_resume(config) is None
    said = f"first_frame={now}: {made / 'checkpoint'} was trained with {before}"
    assert said in caplog.text


def resumed(made: Path, folder: Path, tokenizer: Path, known: bool = True) -> Config:
    """A run in `folder` whose checkpoint is the imported one, as if it had been trained."""
    checkpoint = folder / "checkpoints/step_00000003"
    if not checkpoint.exists():
        shutil.copytree(made / "checkpoint", checkpoint)
    config = start(made, tokenizer, new_tokenizer=True)
    trained = {"step": 3, "samples": 3 * config.data.global_batch}
    run = json.loads((checkpoint / "run.json").read_text()) | trained
    run.pop("weights_only", None)
    if not known:
        run.pop("tokenizer")
    save_run(checkpoint, run)
    config.run.dir, config.init_from = str(folder), None
    config.trainer.resume_data = "fresh"  # an import knows no place in the data
    return config


def test_a_resumed_run_keeps_its_tokenizer(made, tmp_path, caplog):
    checkpoint = tmp_path / "checkpoints/step_00000003"
    assert find_resume(resumed(made, tmp_path, made / "source")) == checkpoint
    mend = f"start a new run with init_from={checkpoint}"
    with pytest.raises(ConfigError, match=mend):
        find_resume(resumed(made, tmp_path, made / "other"))
    # Checkpoints of before do not say it.
    with caplog.at_level(logging.WARNING, log.name):
        find_resume(resumed(made, tmp_path, made / "other", known=False))
    assert "does not say which tokenizer it was trained with" in caplog.text


def test_weights_of_a_llama_go_with_a_tokenizer_of_its_words(made, tmp_path):
    shutil.copy(made / "source/tokenizer.json", tmp_path / "tokenizer.json")
    config = start(made, made / "other")
    config.init_from, config.model.init.from_llama = None, str(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.new_tokenizer=true"):
        find_resume(config)
    config.data.tokenizer = str(made / "source")
    assert find_resume(config) is None
