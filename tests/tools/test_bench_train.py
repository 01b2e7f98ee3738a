"""The training benchmark runs, and both sides of it compute the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPO

TOY_WORLD = REPO / "toy_world"


@pytest.mark.skipif(not TOY_WORLD.is_dir(), reason="data_pipeline.toy renders it")
def test_three_steps_at_one_process_agree_with_transformers(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "bench.json"
    command = [
        sys.executable, "-m", "tools.bench.train", "--data", str(TOY_WORLD), "--stage", "pt1",
        "--layouts", "single", "--warmup", "2", "--steps", "1", "--rounds", "1", "--json", str(out),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ours/HF" in run.stdout
    assert "losses of the warm-up steps agree" in run.stdout
    theirs, ours = json.loads(out.read_text())["stages"][0]["rows"]
    assert (theirs["name"], ours["name"]) == ("HF", "single")
    assert len(ours["losses"]) == 3
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-4)
    assert ours["ratio"] > 0
    for row in (theirs, ours):
        assert row["steps_per_s"] > 0
        assert 0 < row["built_gb"] < row["peak_gb"]
