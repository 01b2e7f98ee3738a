"""Suites during training, and the own evaluator over ranks: in every layout the same scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moss_train.checkpoint_dir import find
from tests.moss_train.train.runs import metrics
from tests.torchrun import run_ranks
from tools.evaluate.__main__ import main

STEPS = 2
LAYOUTS = {"tp2_sp": "parallel=tp2_sp", "pp2_vp2": "parallel=pp2_vp2", "dp2": "parallel=dp2"}


@pytest.fixture(scope="module")
def runs(small: list[str], toy: Path, run_jobs, tmp_path_factory) -> Path:
    """Runs that are asked after each step, in several layouts, and `plain`, which is not."""
    out = tmp_path_factory.mktemp("suites")
    clips = f"{toy}/sft/train/video"  # 24: two blocks, one for each of two replicas
    pictures = f"{toy}/sft/train/image"
    suites = (
        f"{{name: clips, path: {clips}, samples: 20, controls: [blind, shuffled]}}",
        f"{{name: likely, path: {pictures}, samples: 20, scores: likelihood, controls: []}}",
    )
    asked = [f"trainer.eval_suites=[{', '.join(suites)}]", "trainer.eval_suites_every=1"]
    options = ["stage=sft", *(word for word in small if word != "stage=pt2")]
    options += [f"trainer.steps={STEPS}", "data.pad_multiple=4"]
    # The first step is the same in a run of one: a layout is asked once.
    options += ["stage.schedule=constant", "stage.warmup_ratio=0"]

    def task(name: str, *more: str) -> dict:
        return {"name": name, "overrides": [*options, *more, f"run.dir={out / name}"]}

    one = run_jobs(1, task("plain"), task("single", *asked))
    two = run_jobs(
        2, *(task(name, *asked, layout, "trainer.steps=1") for name, layout in LAYOUTS.items())
    )
    assert [one.load(name)["error"] for name in ("plain", "single")] == [None, None]
    assert [two.load(name)["error"] for name in LAYOUTS] == [None] * len(LAYOUTS)
    return out


def test_asking_changes_no_loss_and_every_layout_has_the_same_scores(runs: Path) -> None:
    plain, single = metrics(runs / "plain"), metrics(runs / "single")
    assert [row["loss"] for row in single] == [row["loss"] for row in plain]
    assert [row["grad_norm"] for row in single] == [row["grad_norm"] for row in plain]
    assert "suites" not in plain[0]
    expected = single[0]["suites"]
    assert list(expected["likely"]) == ["multiple choice"]
    assert {"answers exact", "multiple choice", "multiple choice (blind)"} < set(expected["clips"])
    assert 0 < expected["likely"]["multiple choice"] < 1
    for name in LAYOUTS:
        assert metrics(runs / name)[0]["suites"] == expected


def test_ranks_that_share_a_checkpoint_answer_as_one_process(runs: Path, toy, tmp_path) -> None:
    checkpoint = find(runs / "single")
    suite = [str(checkpoint), "--suite", str(toy / "sft/train/image"), "--limit", "20"]
    common = ["--checkpoint", *suite, "--device", "cpu", "--threads", "1", "--controls", "blind"]
    ways = {"data": [], "tensor": ["--tensor", "2"], "pipeline": ["--pipeline", "2"]}
    files = {name: str(tmp_path / f"{name}.json") for name in (*ways, "one")}
    todo = [[*common, *more, "--out", files[name]] for name, more in ways.items()]
    run_ranks("tests/workers/evaluate.py", 2, json.dumps(todo))
    assert main([*common, "--out", files["one"]]) == 0
    one, *others = (json.loads(Path(files[name]).read_text()) for name in ("one", *ways))
    picked = {s["value"] for s in one["scores"] if s["metric"] == "multiple choice"}
    assert len(picked) == 1
    assert 0 < picked.pop() < 1
    for other in others:
        assert other == one
