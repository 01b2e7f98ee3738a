"""The bench of the loader runs, at a size that says nothing."""

from __future__ import annotations

import re
import subprocess
import sys

import torch

from data_pipeline.images import decode_image, tile_image
from tests.conftest import REPO
from tools.bench.data import TILE, picture, plain_tile


def test_the_baseline_makes_the_same_pictures() -> None:
    data = picture(3)
    assert torch.equal(plain_tile(data), tile_image(decode_image(data), TILE, 1)[0][0])


def test_it_prints_what_it_promises() -> None:
    size = ["--rounds", "1", "--images", "3", "--videos", "1", "--shards", "12"]
    result = subprocess.run(
        [sys.executable, "-m", "tools.bench.data", *size],
        cwd=REPO, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for kind in ("image", "video"):
        assert re.search(rf"{kind} +loader / bare: best rounds \d+\.\d+", result.stdout)
    assert re.search(r"12 shards: built in \d+\.\d+ s, first batch \d+\.\d+ s", result.stdout)
