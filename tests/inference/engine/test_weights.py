"""Weights that are read to where they live are those that transformers reads, whole and in the
slices of several ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.engine.load import load_model
from inference.engine.staging import THREADS
from inference.engine.tensor_parallel import shard
from inference.engine.weights import read_model
from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from tests.torchrun import Result, run_ranks

CPU = torch.device("cpu")


def by_transformers(folder: Path, dtype: torch.dtype) -> MossVideoForConditionalGeneration:
    return MossVideoForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def equal(model: torch.nn.Module, wanted: torch.nn.Module) -> None:
    found, expected = model.state_dict(), wanted.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
        assert found[name].is_contiguous(), name


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_transformers_reads_them(tiny: Path, dtype: torch.dtype) -> None:
    read = read_model(tiny, MossVideoConfig.from_pretrained(tiny), dtype, CPU)
    assert (read.missing, read.unexpected) == ([], [])
    equal(read.model, by_transformers(tiny, dtype))


def test_several_files_and_names_of_transformers_4(folder: Path) -> None:
    wanted = by_transformers(folder, torch.float32)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        old = {
            name.replace("model.language_model.", "language_model.model.")
            .replace("lm_head.", "language_model.lm_head.")
            .replace("model.vision_model.", "vision_model."): tensors[name]
            for name in names
        }
        file = f"model-{number}.safetensors"
        save_file(old, folder / file)
        where |= dict.fromkeys(old, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    equal(load_model(folder, "cpu", "fp32"), wanted)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded: .*model-1\.safetensors"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_slice(tiny: Path, rank: int) -> None:
    wanted = by_transformers(tiny, torch.float32)
    shard(wanted, rank, 2)
    config = MossVideoConfig.from_pretrained(tiny)
    read = read_model(tiny, config, torch.float32, CPU, rank, 2)
    assert (read.missing, read.unexpected) == ([], [])
    equal(read.model, wanted)


@pytest.mark.parametrize("rows", [2, 0.5])
def test_a_tensor_of_another_size_is_named(rows: float, folder: Path) -> None:
    """Also where it is twice as large: that is not a slice of it."""
    tensors, name = load_file(folder / "model.safetensors"), "model.language_model.norm.weight"
    size = len(tensors[name])
    tensors[name] = torch.ones(int(rows * size))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"^{folder}: {name} is \[{int(rows * size)}\], the model's is"
    ):
        load_model(folder, "cpu")


NORM, HEAD = "model.language_model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("a tensor in two files", "a.safetensors and b.safetensors hold lm_head.weight"),
        ("two names", "holds .*lm_head.weight and .*lm_head.weight, which are one tensor"),
        ("a whole file beside", "holds model.safetensors and .*index.json, whose files are others"),
        ("an index of nothing", "index.json: cannot be read"),
        ("a pointer", "model.safetensors is a pointer of Git LFS"),
    ],
)
def test_weights_that_say_two_things_are_refused(change: str, says: str, folder: Path) -> None:
    """transformers takes any of them."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    tensors = load_file(whole)
    if change == "two names":
        save_file({**tensors, f"language_model.{HEAD}": tensors[HEAD] + 1}, whole)
    elif change == "an index of nothing":
        index.write_text("[]")
    elif change == "a pointer":
        whole.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    else:
        save_file({HEAD: tensors.pop(HEAD)}, folder / "a.safetensors")
        where = {HEAD: "a.safetensors"} | dict.fromkeys(tensors, "b.safetensors")
        index.write_text(json.dumps({"weight_map": where}))
        twice = {HEAD: tensors[NORM].clone()} if change == "a tensor in two files" else {}
        save_file(tensors | twice, folder / "b.safetensors")
    if change == "a tensor in two files":
        whole.unlink()
    with pytest.raises(ValueError, match=f"^{folder}.*{says}"):
        load_model(folder, "cpu")


def test_processes_of_a_cpu_share_the_file(tiny: Path) -> None:
    """Weights in the dtype of the file are its pages; others are a copy."""
    config = MossVideoConfig.from_pretrained(tiny)
    for dtype, shared in ((torch.float32, True), (torch.bfloat16, False)):
        model = read_model(tiny, config, dtype, CPU).model
        weight = model.model.language_model.embed_tokens.weight
        lines = Path("/proc/self/maps").read_text().splitlines()
        own = [line for line in lines if str(tiny / "model.safetensors") in line]
        ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in own]
        assert any(a <= weight.data_ptr() < b for a, b in ranges) == shared


def test_weights_in_torchs_own_form(folder: Path) -> None:
    """Which transformers reads: no safetensors, no slices of a file."""
    wanted = by_transformers(folder, torch.float32)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    equal(load_model(folder, "cpu", "fp32"), wanted)


def loaded(tiny: Path, out: Path, *options: str) -> Result:
    """By a process with a simulated GPU."""
    cache = {"XDG_CACHE_HOME": str(out)}
    return run_ranks("tests/workers/loading.py", 1, str(tiny), *options, env=cache, out=out)


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_weights_go_to_a_device_through_page_locked_memory(
    tiny: Path, tmp_path: Path, quantize: str
) -> None:
    """By copies for which only the threads wait that fill a buffer anew."""
    result = loaded(tiny, tmp_path, *([quantize] if quantize else []))
    wanted = load_model(tiny, "cpu", "fp32", quantize or None).state_dict()
    found, seen = result.load("weights"), result.load("seen")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (place,) = seen.waits
    assert place.startswith("event at inference/engine/staging.py")
    scales = sum(name.endswith(".scale") for name in wanted)
    assert seen.counts["copies"] == len(wanted) - scales  # each fits a buffer
    assert quantize or seen.waits[place] == len(wanted) - 2 * THREADS


def test_page_locked_memory_that_loses_a_number_is_not_used(tiny: Path, tmp_path: Path) -> None:
    result = loaded(tiny, tmp_path, "broken")
    wanted, found = load_model(tiny, "cpu", "fp32").state_dict(), result.load("weights")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    said = (
        "loading through page-locked memory is not used on a simulated GPU: a device that is busy"
    )
    assert said in result.stderr()
