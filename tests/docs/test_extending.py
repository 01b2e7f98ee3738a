"""docs/extending.md: its diffs apply to the code as it is, in their order, and its commands run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

PAGE = REPO / "docs" / "extending.md"
BLOCK = re.compile(r"```(diff|bash)\n(.*?)```", re.DOTALL)
TREES = ("conf", "data_pipeline", "inference", "launch", "moss_train", "tools")


def run(command: str, tree: Path) -> str:
    """What a command of the page prints in the copied checkout."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, shell=True, cwd=tree, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A checkout with all changes of the page, and what each command printed."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in TREES:
        shutil.copytree(REPO / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    printed: dict[str, str] = {}
    for kind, text in BLOCK.findall(PAGE.read_text()):
        if kind == "diff":
            subprocess.run(["git", "apply", "-"], input=text, text=True, cwd=tree, check=True)
            continue
        for command in text.splitlines():
            printed[command] = run(command, tree)
    return tree, printed


def test_the_form_reads_its_records_and_rejects_the_incomplete_one(extended) -> None:
    tree, printed = extended
    (built,) = [out for command, out in printed.items() if "data_pipeline.build" in command]
    assert "3 records: 2 imported, 1 rejected" in built
    (line,) = (tree / "shards/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["detail"] == "reply: None is not a text"


def test_what_it_adds_passes_the_checks_of_the_project(extended) -> None:
    tree, _ = extended
    config = ["--config", str(REPO / "pyproject.toml"), "--no-cache"]
    for check in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *check, *config, "data_pipeline/importers"]
        done = subprocess.run(ruff, cwd=tree, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_model_has_the_sizes_of_its_preset(extended) -> None:
    _, printed = extended
    (shown,) = [out for command, out in printed.items() if "--cfg job" in command]
    assert "name: small" in shown
    assert "hidden_size: 256" in shown


def test_one_step_of_the_stage_trains_the_model_on_the_source(extended) -> None:
    tree, _ = extended
    (step,) = map(json.loads, (tree / "runs/vqa/metrics.jsonl").read_text().splitlines())
    assert (step["step"], step["samples"]) == (1, 4)
    assert set(step["epochs"]) == {"questions", "pictures"}
    described = json.loads((tree / "runs/vqa/run.json").read_text())
    trained = described["parameters"]["trained"]
    assert {part for part, count in trained.items() if count} == {"decoder"}
    assert (described["config"]["stage"]["name"], described["config"]["model"]["name"]) == (
        "vqa",
        "small",
    )
