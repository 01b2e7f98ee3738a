"""What is wrong with a source is named, all of it, and nothing is left behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from moss_train.config import ConfigError
from moss_train.convert.job import check_disk, check_manifest, new_folder
from moss_train.convert.source import ConversionError
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.convert.to_megatron import FromHf, convert_hf
from moss_train.processes import stat_fields
from tests.golden.make_mllama import CONFIG
from tests.moss_train.convert.sources import (
    differing,
    load_folder,
    mllama_weights,
    save_by_transformers,
    save_folder,
)
from tests.torchrun import REPO
from tests.waiting import PATIENCE, until

QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"
NORM = "language_model.model.norm.weight"


def refusal(source: Path, out: Path, **options) -> str:
    """The error of a conversion, which leaves nothing."""
    with pytest.raises((ConversionError, ConfigError)) as caught:
        convert_hf(FromHf(source, out, **options))
    assert sorted(path.name for path in out.parent.iterdir()) == sorted({source.name})
    return str(caught.value)


def test_missing_surplus_and_misshapen_tensors_are_all_named(tmp_path):
    weights = mllama_weights()
    del weights[NORM], weights["vision_model.class_embedding"]
    weights[QUERY] = weights[QUERY][:-1].contiguous()
    weights["extra.weight"] = torch.zeros(2, 3)
    said = refusal(save_folder(tmp_path / "hf", weights), tmp_path / "out")
    assert said.splitlines()[1:] == [
        "missing: vision_model.class_embedding [16]",
        "missing: language_model.model.norm.weight [32]",
        "surplus: extra.weight [2, 3], which the model does not have",
        f"misshapen: {QUERY} [31, 32], must be [32, 32]",
    ]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "llava", "architectures": ["LlavaForX"]}, r"is of \['LlavaForX'\]: only"),
        ({**CONFIG, "pool_mode": "median", "pool_stride": 2}, "pool_mode is 'median'"),
    ],
)
def test_another_architecture_is_refused(config, named, tmp_path):
    said = refusal(save_folder(tmp_path / "hf", mllama_weights(), config), tmp_path / "out")
    assert re.search(named, said)
    assert "hf/config.json" in said


def test_arch_insists(tmp_path):
    config = {**CONFIG, "pool_mode": "average", "pool_stride": 2}
    source = save_folder(tmp_path / "hf", mllama_weights(), config)
    assert "with pooling it is not plain" in refusal(source, tmp_path / "out", arch="mllama")


def test_a_file_that_is_cut_short_is_named(tmp_path):
    source = save_by_transformers(tmp_path / "hf")
    victim = sorted(source.glob("model-0*.safetensors"))[2]
    os.truncate(victim, victim.stat().st_size - 100)
    said = refusal(source, tmp_path / "out")
    assert f"{victim}: damaged or cut short" in said


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("model-00009-of-00009.safetensors", "which is not there"),
        ("../../secret.safetensors", "weights must be files of this folder"),
        ("/etc/passwd", "weights must be files of this folder"),
        ("weights.bin", "of another kind than the index"),
    ],
)
def test_an_index_cannot_name_what_is_not_in_the_folder(place, named, tmp_path):
    source = save_by_transformers(tmp_path / "hf")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = place
    path.write_text(json.dumps(index))
    said = refusal(source, tmp_path / "out")
    assert place in said
    assert named in said


def test_an_index_and_its_files_must_agree(tmp_path):
    source = save_by_transformers(tmp_path / "hf")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    there = index["weight_map"].pop(NORM)
    index["weight_map"]["nothing.weight"] = there
    path.write_text(json.dumps(index))
    assert refusal(source, tmp_path / "out").splitlines() == [
        f"{source}: the index says that {there} holds nothing.weight, which it does not",
        f"{source / there}: holds {NORM}, which the index does not name",
    ]


def test_a_tensor_that_two_files_of_an_index_hold_is_told(tmp_path):
    source = save_by_transformers(tmp_path / "hf")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in sorted(set(index.values())) if file != index[NORM])
    twice = load_file(source / index[NORM])[NORM] + 1
    save_file({**load_file(source / other), NORM: twice}, source / other)
    files = " and ".join(sorted((index[NORM], other)))
    assert refusal(source, tmp_path / "out") == f"{source}: {files} hold {NORM}: fetch both again"


def test_weights_that_are_no_numbers_are_refused_if_asked(tmp_path):
    weights = mllama_weights()
    weights[QUERY][3, :2] = float("nan")
    weights[NORM][0] = float("inf")
    source = save_folder(tmp_path / "hf", weights)
    said = refusal(source, tmp_path / "out", check_finite=True)
    assert sorted(said.splitlines()[1:]) == [
        f"{QUERY}: 2 numbers are NaN or infinite",
        f"{NORM}: 1 numbers are NaN or infinite",
    ]
    convert_hf(FromHf(source, tmp_path / "out"))
    options = ToHf(tmp_path / "out", tmp_path / "back", REPO / "inference/hf", check_finite=True)
    with pytest.raises(ConversionError, match="not finite"):
        convert_megatron(options)
    assert not (tmp_path / "back").exists()


class Evil:
    """What a pickle of a stranger may do."""

    def __reduce__(self):
        return os.system, ("touch evil",)


def test_pickles_are_read_on_demand_and_only_as_weights(tmp_path, monkeypatch):
    source = tmp_path / "hf"
    save_folder(source, {"x": torch.zeros(1)})
    (source / "model.safetensors").unlink()
    weights = mllama_weights()
    torch.save(weights, source / "pytorch_model.bin")
    assert "--allow-pickle" in refusal(source, tmp_path / "out")
    convert_hf(FromHf(source, tmp_path / "out", allow_pickle=True))
    convert_megatron(ToHf(tmp_path / "out", tmp_path / "back", REPO / "inference/hf"))
    assert differing(load_folder(tmp_path / "back"), weights) == []
    # As torch wrote them up to 1.5.
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_hf(FromHf(source, tmp_path / "old", allow_pickle=True))
    convert_megatron(ToHf(tmp_path / "old", tmp_path / "old_back", REPO / "inference/hf"))
    assert differing(load_folder(tmp_path / "old_back"), weights) == []

    folder = tmp_path / "evil_folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(ConversionError, match="cannot be read as weights alone"):
        convert_hf(FromHf(source, tmp_path / "other", allow_pickle=True))
    # A checkpoint's own pickle is not trusted either.
    (tmp_path / "out" / ".metadata").write_bytes(pickle.dumps(Evil()))
    complete = json.loads((tmp_path / "out" / "complete.json").read_text())
    complete["files"].pop(".metadata")
    (tmp_path / "out" / "complete.json").write_text(json.dumps(complete))
    with pytest.raises(ConversionError, match=r"it asks for posix\.system"):
        convert_megatron(ToHf(tmp_path / "out", tmp_path / "other", REPO / "inference/hf"))
    assert not list(folder.iterdir())


def test_the_manifest_finds_what_changed(tmp_path):
    convert_hf(FromHf(save_folder(tmp_path / "hf", mllama_weights()), tmp_path / "megatron"))
    convert_megatron(ToHf(tmp_path / "megatron", tmp_path / "back", REPO / "inference/hf"))
    assert check_manifest(tmp_path / "megatron") == check_manifest(tmp_path / "back") == []
    victim = tmp_path / "back" / "model-00001-of-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    (tmp_path / "back" / "config.json").unlink()
    said = check_manifest(tmp_path / "back")
    assert [line.split(": ")[0] for line in said] == [
        str(tmp_path / "back/config.json"),
        str(victim),
    ]


def test_what_exists_is_not_overwritten_and_a_full_disk_is_noticed_first(tmp_path):
    source = save_folder(tmp_path / "hf", mllama_weights())
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("out", "link"):
        with pytest.raises(ConversionError, match="exists: choose another"):
            convert_hf(FromHf(source, tmp_path / out))
    with pytest.raises(ConversionError, match="make room"):
        check_disk(tmp_path, 10**18)
    with pytest.raises(ConversionError, match="make room"), new_folder(tmp_path / "big", 10**18):
        raise AssertionError
    with (
        new_folder(tmp_path / "big", 1),
        pytest.raises(ConversionError, match="another process"),
        new_folder(tmp_path / "big", 1),
    ):
        raise AssertionError
    assert (tmp_path / "big").is_dir()


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """370 MB of weights, a ninth of it in the largest tensor."""
    folder = tmp_path_factory.mktemp("large")
    config = json.loads(json.dumps(CONFIG))
    config["text_config"] |= {
        "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 20000,
        "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 8,
    }  # fmt: skip
    config["image_token_index"] = 20000
    config["torch_dtype"] = "bfloat16"
    from moss_train.convert.hf_config import model_config_from_hf
    from moss_train.model.hf_mapping import hf_shapes, table

    model = model_config_from_hf(config)
    weights = {
        name: torch.zeros(shape, dtype=torch.bfloat16)
        for rule in table(model)
        for name, shape in hf_shapes(model, rule).items()
    }
    folder.joinpath("hf").mkdir()
    save_file(weights, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    return folder


class Peak(threading.Thread):
    """Watches what this process uses, beyond what it used at first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)  # where the conversion fails nobody ends it
        self.process = psutil.Process()
        self.first = self.peak = self.process.memory_info().rss
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.002):
            self.peak = max(self.peak, self.process.memory_info().rss)


def begun(source: Path, out: Path) -> subprocess.Popen:
    """A conversion in another process, which has begun to write, and is stopped there."""
    command = [sys.executable, "-m", "tests.workers.stopped_conversion", "hf-to-megatron"]
    process = subprocess.Popen([*command, str(source), str(out)], cwd=REPO)
    until(lambda: process.poll() is not None or stat_fields(process.pid)[0] == "T")
    assert process.poll() is None
    assert list(out.parent.glob(f".{out.name}.partial/*.distcp"))
    return process


def test_an_interrupted_conversion_clears_up(large):
    process = begun(large / "hf", large / "other")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait(PATIENCE) == 130
    assert sorted(path.name for path in large.iterdir()) == ["hf"]


def test_a_killed_conversion_leaves_nothing_that_looks_complete(large, capsys):
    """And the next one clears up behind it, in bounded memory."""
    source, out = large / "hf", large / "out"
    partial = large / ".out.partial"
    process = begun(source, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.is_dir()
    assert not out.exists()

    watched = Peak()
    watched.start()
    convert_hf(FromHf(source, out))
    watched.over.set()
    watched.join()
    assert "left by a process that was killed" in capsys.readouterr().err
    assert not partial.exists()
    assert sum(path.stat().st_size for path in out.glob("*.distcp")) > 350e6
    largest = 2 * 1024 * 20008
    assert watched.peak - watched.first < 3.5 * largest
