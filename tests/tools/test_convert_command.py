"""The commands, as people call them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
import torch

from moss_train.checkpoint_dir import find, read_run
from moss_train.convert.to_megatron import FromHf, convert_hf
from moss_train.model.hf_mapping import table
from tests.moss_train.convert.sources import mllama_weights, save_folder
from tests.moss_train.model.build import preset
from tests.torchrun import REPO
from tools import convert_checkpoint, verify_checkpoint


def test_the_list_names_every_parameter(capsys):
    assert convert_checkpoint.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert said in (REPO / "docs" / "conversion.md").read_text()
    lines = said.splitlines()
    cells = {cell for line in lines for cell in line.split()}
    for rule in table(preset("11b")):
        numbered = {part for name in (rule.ours, *rule.hf) for part in name.split(".")}
        layer = next((part for part in numbered if part.isdigit()), None)
        for name in (rule.ours, *rule.hf):
            assert (name.replace(f".{layer}.", ".{i}.") if layer else name) in cells
    assert any("cross-attention 3, 8, 13, 18, 23, 28, 33, 38" in line for line in lines)
    assert any("vocabulary 128256, embedded 128264, hidden 4096" in line for line in lines)


def test_there_and_back_and_compared(tmp_path, capsys):
    source, megatron, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    save_folder(source, mllama_weights())
    convert = convert_checkpoint.main
    assert convert(["hf-to-megatron", str(source), str(megatron), "--dtype", "fp32"]) == 0
    assert "tokenizer: none" in capsys.readouterr().out
    assert find(megatron) == megatron
    run = read_run(megatron)
    assert (run["weights_only"], run["config"]["stage"]["name"]) == (True, "imported")
    flags = ["--max-shard-size", "0.1MB", "--workers", "3", "--stage", "sft"]
    assert convert(["megatron-to-hf", str(megatron), str(back), *flags]) == 0
    assert json.loads((back / "config.json").read_text())["moss_stage"] == "sft"
    files = sorted(path.name for path in back.glob("model-*"))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    capsys.readouterr()
    verify = ["--hf", str(back), "--megatron", str(megatron), "--hashes"]
    assert verify_checkpoint.main(verify) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("logits  max ")
    assert float(said[0].split()[2]) < 1e-4
    greedy = [line.split(": ")[1] for line in said if line.startswith("greedy")]
    assert greedy[0] == greedy[1]
    assert said[-1] == "equal within 1e-04"


@pytest.mark.parametrize("kilobytes", [8, 30])
@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_files_that_cannot_grow_are_one_line(direction, kilobytes, tmp_path):
    """As on a disk that others fill while weights are written."""
    source, out = save_folder(tmp_path / "hf", mllama_weights()), tmp_path / "out"
    if direction == "megatron-to-hf":
        convert_hf(FromHf(source, tmp_path / "megatron"))
        source = tmp_path / "megatron"
    before = sorted(tmp_path.iterdir())
    command = shlex.join(["tools.convert_checkpoint", direction, str(source), str(out)])
    limited = f"ulimit -f {kilobytes}; exec {shlex.quote(sys.executable)} -m {command}"
    done = subprocess.run(["bash", "-c", limited], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1
    said = f"python -m tools.convert_checkpoint: error: {out}: File too large"
    assert done.stderr.splitlines()[-1] == said
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--layout", "tp3"], "model.text.num_heads=4: must be a multiple of parallel.tensor=3"),
        (["--layout", "fast"], "--layout fast: must be single, or such as tp2"),
    ],
)
def test_a_layout_that_does_not_fit_is_named(arguments, named, tmp_path, capsys):
    save_folder(tmp_path / "hf", mllama_weights())
    convert_checkpoint.main(["hf-to-megatron", str(tmp_path / "hf"), str(tmp_path / "megatron")])
    both = ["--hf", str(tmp_path / "hf"), "--megatron", str(tmp_path / "megatron")]
    assert verify_checkpoint.main([*both, *arguments]) == 1
    assert named in capsys.readouterr().err


def test_errors_go_to_stderr_with_code_one(tmp_path, capsys):
    convert = convert_checkpoint.main
    assert convert(["hf-to-megatron", str(tmp_path / "no"), str(tmp_path / "out")]) == 1
    assert "/no: cannot be read: No such file" in capsys.readouterr().err
    assert convert(["megatron-to-hf", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "no complete checkpoint there" in capsys.readouterr().err
    save_folder(tmp_path / "hf", {"x": torch.zeros(1)})
    assert verify_checkpoint.main(["--hf", str(tmp_path / "hf"), "--megatron", str(tmp_path)]) == 1
    assert "no complete checkpoint there" in capsys.readouterr().err
