"""Validation during training: the same losses in every layout, in the rows of their steps."""

from __future__ import annotations

import json
import math

import pytest

from data_pipeline.batch import Unlearned
from moss_train.data_config import SourceConfig
from moss_train.train.metrics import read_metrics
from moss_train.train.validation import describe, validation
from tests.moss_train.train.runs import metrics
from tests.pages import open_page


def test_validation_is_the_same_in_every_layout_and_falls(small, toy, run_jobs, tmp_path):
    held = [
        f"{{name: seen-{m}, path: {toy}/pt2/train/{m}, modality: {m}}}"
        for m in ("text", "image", "video")
    ]
    options = [*small, "data.eval_samples=7", f"data.eval_sources=[{', '.join(held)}]"]
    # Small weights, so that the untrained model holds all 512 tokens for about equally likely.
    still = [*options, "trainer.steps=1", "trainer.eval_every=1", "optimizer.lr=1e-12"]
    still += ["model.init.std=0.02"]

    def task(name: str, overrides: list[str], *more: str):
        run = f"run.dir={tmp_path / name}"
        return {"name": name, "overrides": [*overrides, *more, run], "page": name == "learns"}

    one = run_jobs(
        1, task("single", still), task("learns", options, "trainer.eval_every=3", "trainer.steps=4")
    )
    layouts = {"dp2": "parallel=dp2", "stages": "parallel=pp2_vp2"}
    two = run_jobs(2, *(task(name, still, layout) for name, layout in layouts.items()))
    assert [one.load(name)["error"] for name in ("single", "learns")] == [None, None]
    assert [two.load(name)["error"] for name in layouts] == [None, None]

    (row,) = metrics(tmp_path / "single")
    expected = row["validation"]
    assert expected["skipped_samples"] == 0
    assert expected["source"].keys() == {"seen-text", "seen-image", "seen-video"}
    assert expected["modality"]["video"] == expected["source"]["seen-video"]
    assert expected["loss"] == pytest.approx(math.log(512), abs=0.5)
    assert expected["accuracy"]["all"] < 0.1
    for name in layouts:
        (row,) = metrics(tmp_path / name)
        assert row["validation"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["validation"]["source"] == pytest.approx(expected["source"], rel=1e-5)
        assert row["validation"]["accuracy"] == expected["accuracy"]

    rows = read_metrics(tmp_path / "learns")
    assert ["validation" in row for row in rows] == [False, False, True, True]
    assert rows[3]["validation"]["loss"] < expected["loss"] - 0.02
    page = open_page(tmp_path / "learns/report.html")
    assert "Validation after step 4" in page.text
    measured = rows[3]["validation"]
    for name in ("text", "image", "video"):
        accuracy = measured["accuracy"]["source"][f"seen-{name}"]
        assert page.row(f"seen-{name}")[-2:] == [
            f"{measured['source'][f'seen-{name}']:.4f}", f"{accuracy:.3f}",
        ]  # fmt: skip
    assert page.row("all") == [f"{measured['loss']:.4f}", f"{measured['accuracy']['all']:.3f}"]

    described = json.loads((tmp_path / "dp2" / "run.json").read_text())
    assert described["layout"] == {"world": 2, "data": 2, "pipeline": 1, "tensor": 1}
    assert described["config"]["trainer"]["eval_every"] == 1
    assert described["versions"]["torch"]
    total = described["parameters"]["total"]
    assert total == described["parameters"]["trained"]
    assert described["parameters"]["patterns"] == {"*": sum(total.values())}


def test_means_are_over_labels():
    sources = [SourceConfig(n, "", m) for n, m in (("a", "text"), ("b", "video"), ("c", "video"))]
    sums = [[2.0, 4.0, 3.0], [6.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    unlearned = Unlearned(truncated_samples=2, truncated_labels=5, turns=9, masked_turns=3)
    measured = validation(sources, sums, 8, {"bad_json": 1}, unlearned)
    assert measured == {
        "loss": 8 / 6,
        "source": {"a": 0.5, "b": 3.0, "c": None},
        "modality": {"text": 0.5, "video": 3.0},
        "accuracy": {
            "all": 3 / 6,
            "source": {"a": 0.75, "b": 0.0, "c": None},
            "modality": {"text": 0.75, "video": 0.0},
        },
        "samples": 8,
        "labels": 6,
        "skipped_samples": 1,
        "skipped_reasons": {"bad_json": 1},
        "truncated_samples": 2,
        "truncated_labels": 5,
        "turns": 9,
        "masked_turns": 3,
    }
    assert describe(measured) == (
        "loss 1.3333 accuracy 0.500 (text 0.5000 0.750, video 3.0000 0.000)"
    )
