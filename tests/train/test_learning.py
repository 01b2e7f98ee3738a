"""A job learns to see, in about a minute: captions of held-out pictures, far beyond a blind guess.
What it has learned streams as it reads offline.

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
from data_pipeline.toy.render import draw
from data_pipeline.toy.world import still
from inference.checkpoint import load_model
from inference.engine import Engine
from tests.inference.streams import Player, largest_error, make_stream, offline, play
from tests.torchrun import REPO

STEPS = 220


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
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on pictures only, `run` in it."""
    folder: Path = tmp_path_factory.mktemp("learning")
    build_toy(folder / "world", ToyConfig(train=2000, heldout=60, stages=("pt1",)))
    run(
        "launch/train.py", "stage=pt1", "model=toy", "data=toy", "hardware=cpu",
        "hardware.threads=1", "stage.mixture={text: 0, image: 1, video: 0}",
        f"data.root={folder}/world", f"run.dir={folder}/run", f"trainer.steps={STEPS}",
    )  # fmt: skip
    return folder


def test_held_out_pictures_are_described(trained: Path) -> None:
    run("-m", "tools.evaluate", "--checkpoint", f"{trained}/run", "--threads", "1")
    result = json.loads((trained / "run/evaluation.json").read_text())
    assert result["step"] == STEPS
    score = {score["source"]: score for score in result["scores"]}["pt1/image"]
    assert score["metric"] == "caption token accuracy"
    assert score["count"] == 60
    # A model that has learned the language of captions, but sees nothing, gets the blind share;
    # random weights get less than chance, the most frequent token's share.
    assert score["chance"] < 0.2
    assert score["blind"] < 0.7
    assert score["value"] > 0.7
    assert score["value"] > score["blind"] + 0.08


@pytest.mark.parametrize("window", [8, 3])
def test_trained_weights_stream_as_they_read_offline(trained: Path, window: int) -> None:
    if not (trained / "export").exists():
        run(
            "-m",
            "tools.convert_checkpoint",
            "megatron-to-hf",
            f"{trained}/run",
            f"{trained}/export",
        )
    model = load_model(trained / "export", "cpu", "fp32")
    engine = Engine(model, max_tokens=64, window=window)
    stream = make_stream(4)
    stream.pixels = engine.pixels([draw(still(seed), 56) for seed in range(6)])[:, 0]
    player = Player(engine, stream)
    play(engine, [player])

    def sees(t: int, f: int) -> bool:
        arrived = sum(mark <= t for mark in stream.marks)
        return arrived - window <= f < arrived

    wanted = offline(model, stream, sees)
    assert wanted.std() > 1
    assert largest_error(player, wanted) < 1e-4
