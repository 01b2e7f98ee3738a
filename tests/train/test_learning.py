"""A job learns to see, in about a minute: captions of held-out pictures, far beyond a blind guess.

The four stages together take minutes: `make demo`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.toy.build import ToyConfig, build_toy
from tests.torchrun import REPO

STEPS = 160


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What tools.evaluate says of a short run on pictures only."""
    folder: Path = tmp_path_factory.mktemp("learning")
    build_toy(folder / "world", ToyConfig(train=2000, heldout=60, stages=("pt1",)))
    run(
        "launch/train.py", "stage=pt1", "model=toy", "data=toy", "hardware=cpu",
        "hardware.threads=1", "stage.mixture={text: 0, image: 1, video: 0}",
        f"data.root={folder}/world", f"run.dir={folder}/run", f"trainer.steps={STEPS}",
    )  # fmt: skip
    run("-m", "tools.evaluate", "--checkpoint", f"{folder}/run", "--threads", "1")
    result = json.loads((folder / "run/evaluation.json").read_text())
    assert result["step"] == STEPS
    return {score["source"]: score for score in result["scores"]}


def test_held_out_pictures_are_described(scores) -> None:
    score = scores["pt1/image"]
    assert score["metric"] == "caption token accuracy"
    assert score["count"] == 60
    # A model that has learned the language of captions, but sees nothing, gets the blind share;
    # random weights get less than chance, the most frequent token's share.
    assert score["chance"] < 0.2
    assert score["blind"] < 0.65
    assert score["value"] > 0.7
    assert score["value"] > score["blind"] + 0.08
