"""Every piece of code in docs/python.md runs, in its order, as it stands there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from data_pipeline.toy.build import ToyConfig, build_toy
from tests.conftest import REPO
from tests.samples import graded_video
from tests.workers.blocks import BLOCK
from tools.preloaded import Command

PAGE = REPO / "docs" / "python.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's code has run: its files, and what it printed in `log`."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("page")
    build_toy(folder / "toy_world", ToyConfig(train=20, heldout=1, stages=("sft", "realtime_sft")))
    Image.new("RGB", (80, 60), "red").save(folder / "picture.jpg")
    graded_video(folder / "clip.mp4", [i / 5 for i in range(15)])
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    before = Path.cwd()
    os.chdir(folder)  # which the command inherits
    try:
        command = Command("tests.workers.blocks", [str(PAGE)], environment, folder / "log")
    finally:
        os.chdir(before)
    assert command.wait(300) == 0, (folder / "log").read_text()[-4000:]
    return folder


def test_examples_are_short() -> None:
    lengths = [len(block.strip().splitlines()) for block in BLOCK.findall(PAGE.read_text())]
    assert len(lengths) >= 7
    assert max(lengths) <= 10


def test_runs_and_exports_are_left(folder: Path) -> None:
    for name in ("first", "live"):
        lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))
        assert (folder / "exports" / name / "model.safetensors.index.json").exists()
    config = json.loads((folder / "exports" / "live" / "config.json").read_text())
    assert config["moss_stage"] == "realtime_sft"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_page_says_is_printed(folder: Path) -> None:
    printed = re.split(r"^--- \d+\n", (folder / "log").read_text(), flags=re.MULTILINE)[1:]
    assert "model=tpy: choose one of 11b, 90b, tiny, toy\n" in printed
    _, _, look, _, _, _, watched, live = printed
    assert re.match(r"\d\.\d\d -> \d\.\d\d at \d+ tokens/s\n", look)
    assert "runs/first runs/first/checkpoints/step_00000010" in look
    decisions = re.findall(r"^(\d)\.0 (silence|speech)$", watched, flags=re.MULTILINE)
    assert [second for second, _ in decisions] == ["0", "1", "2"]
    assert "'session.closed'" in live
