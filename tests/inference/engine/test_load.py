"""Opening folders: what fits, what does not, what is quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.engine.load import load_engine, load_model, load_processor
from inference.engine.quantized_linear import QuantizedLinear
from tests.inference.engine.streams import Player, largest_error, make_stream, offline, play


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_export_streams_what_its_weights_say(kind: str, folder: Path) -> None:
    """In compressed-tensors' form: 8-bit numbers, a scale a row."""
    tensors = load_file(folder / "model.safetensors")
    full = dict(tensors)
    dtype, largest = (torch.int8, 127) if kind == "int8" else (torch.float8_e4m3fn, 448)
    for name in list(tensors):
        if name.startswith("model.language_model.layers.") and name.endswith("_proj.weight"):
            scale = tensors[name].abs().amax(1, keepdim=True) / largest
            numbers = tensors[name] / scale
            tensors[name] = (numbers.round() if kind == "int8" else numbers).to(dtype)
            tensors[f"{name}_scale"] = scale
            full[name] = tensors[name].float() * scale
    save_file(full, folder / "model.safetensors")
    stream = make_stream(1)
    wanted = offline(load_model(folder, "cpu"), stream)

    save_file(tensors, folder / "model.safetensors")
    form = "int-quantized" if kind == "int8" else "float-quantized"
    method = {"quant_method": "compressed-tensors", "format": form}
    change_config(folder, quantization_config=method)
    engine = load_engine(folder, device="cpu", max_tokens=64, window=8)
    layer = engine.model.model.language_model.layers[0]
    assert isinstance(layer.self_attn.q_proj, QuantizedLinear)
    player = Player(engine, stream)
    play(engine, [player])
    assert largest_error(player, wanted) < 1e-4
    with pytest.raises(ValueError, match=f"the checkpoint is quantized as {kind}"):
        load_model(folder, "cpu", quantize="int4")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 tensors: model.language_model.norm.weight"):
        load_model(folder, "cpu")


def test_a_model_without_its_head_is_named(folder: Path, tmp_path: Path) -> None:
    load_model(folder, "cpu").model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare: is a MossVideoModel, which has no output head"):
        load_model(tmp_path / "bare", "cpu")


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{folder}: cannot be loaded"):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "quantization_config is none of"),
        ({"pool_mode": "mean"}, {}, "pool_mode 'mean'"),
        ({"model_type": "llama"}, {}, "is of llama, not of this model: convert it"),
        ({}, {"dtype": "fp64"}, "dtype=fp64: allowed: fp32"),
        ({}, {"quantize": "int3"}, "quantize=int3: allowed: int8, fp8, int4"),
        ({}, {"device": "cuda"}, "device=cuda: this machine has no CUDA: use cpu, or auto"),
        ({}, {"device": "cuda0"}, "device=cuda0: allowed: auto, cuda, npu, xpu, mps, cpu, or one"),
    ],
)
def test_wrong_configs_and_options_are_refused(
    changes, options, message: str, folder: Path
) -> None:
    if "device" in options and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(folder, **({"device": "cpu"} | options))


def test_an_attention_that_cannot_be_is_refused_before_ranks_meet(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("inference.engine.load.join")
    said = "^attention=flash: runs on cuda, not on cpu: use auto or sdpa$"
    with pytest.raises(ValueError, match=said):
        load_engine(folder, device="cpu", attention="flash")


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json: give a folder"):
        load_model(tmp_path)


def test_tensors_beside_the_models_are_named_and_saved_buffers_are_not(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    load_model(folder, "cpu")
    tensors["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(8, 8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"beside the model's, it has 1 tensors: .*lora_A.weight"):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json"], "holds an adapter of PEFT: merge it"),
        (["adapter_model.safetensors", "config.json"], "holds an adapter of PEFT: merge it"),
        (["run.json"], "is a checkpoint of training: export it"),
        (["checkpoints/step_00000010/run.json"], "is a checkpoint of training: export it"),
    ],
)
def test_folders_of_other_kinds_are_told_apart(files, message: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_none_is_named(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{folder}/config.json: "):
        load_model(folder, "cpu")


def test_an_adapter_in_an_export_is_not_left_out(folder: Path) -> None:
    """PEFT saves one where it is told; transformers would load it."""
    (folder / "training.json").write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="remove its files if the weights have it already"):
        load_model(folder, "cpu")


def test_a_processor_without_its_files_is_named(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"^{folder}: its processor cannot be loaded: "):
        load_processor(folder)
