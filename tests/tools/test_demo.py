"""The demo at a tiny size: shipped weights learn on, and all ends on a page."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.toy.build import ToyConfig, build_toy
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from moss_train.data_config import CONTROLS
from moss_train.evaluate.exported import ExportedModel
from moss_train.evaluate.items import read_shards
from moss_train.evaluate.suite import evaluate
from tests.moss_train.train.runs import losses
from tests.pages import Page, open_page
from tests.torchrun import REPO
from tools.demo import checkpoint, narrate, report
from tools.demo import losses as losses_command
from tools.demo.__main__ import main, run_all
from tools.demo.checkpoint import FILES, SHIPPED, WEIGHTS, pack, unpack
from tools.demo.narrate import spoken
from tools.demo.parts import LOSSES, Part, compared

SIZES = ["--train", "80", "--heldout", "8", "--scale", "0.042", "--ranks", "1"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo of 21 steps."""
    folder: Path = tmp_path_factory.mktemp("demo") / "out"
    assert main(["--out", str(folder), *SIZES, "trainer.eval_every=10"]) == 0
    return folder


@pytest.fixture(scope="module")
def page(demo: Path) -> Page:
    return open_page(demo / "report.html")


def test_shipped_weights_see_and_learn_to_watch(demo: Path) -> None:
    """They answer questions about pictures, and have never been silent before a frame."""
    before = scores(demo / "before.json")
    seen = before["realtime_sft/image", "answers exact"]
    assert seen["value"] >= 0.9
    assert seen["blind"] <= 0.7
    found = losses(demo / "realtime_sft")
    assert len(found) == 21
    assert found[0] > 3
    assert sum(found[-5:]) / 5 < 1


def test_shipped_weights_know_the_order_of_frames(tmp_path: Path) -> None:
    """Of new clips: the model that sees all frames in their order answers right; without frames,
    with one or with all in another order it guesses. So few guesses have a standard deviation of
    0.06."""
    build_toy(tmp_path / "world", ToyConfig(train=1, heldout=80, seed=77, stages=("sft",)))
    unpack(SHIPPED, tmp_path / "shipped")
    load = MossVideoForConditionalGeneration.from_pretrained
    held_out = tmp_path / "world/sft/heldout"
    with ExportedModel.open_with(load, tmp_path / "shipped", "cpu", 1) as model:
        clips = read_shards(held_out / "video", "clips", model.encoder)
        asked = [item for item in clips if item.task.startswith("time/")]
        pictures = [*read_shards(held_out / "image", "pictures", model.encoder, 20)]
        time = evaluate(model, asked, controls=CONTROLS).scores[0]
        seen = evaluate(model, pictures).scores[0]
    assert (time.metric, time.count) == ("answers exact", len(asked))
    assert len(asked) > 50
    assert time.value >= 0.85
    assert time.chance is not None
    for control in CONTROLS:
        assert getattr(time, control) <= time.chance + 0.1, control
    assert seen.value >= 0.9


def test_the_page_has_the_figures_of_the_files(demo: Path, page: Page) -> None:
    after = scores(demo / "realtime_sft/evaluation.json")
    before = scores(demo / "before.json")
    rows = {(row[0], row[1]): row[2:] for row in page.tables[2][1:]}
    for (source, metric), score in after.items():
        name = source, metric
        shown = source.replace("all sources", "realtime_sft, all sources"), metric
        assert rows[shown][:2] == [f"{before[name]['value']:.3f}", f"{score['value']:.3f}"]
    (says,) = (row[1:] for row in page.tables[0] if row[0] == "the model says")
    assert [(s, words) for s, words in enumerate(says) if words] == spoken(demo / "narration.jsonl")
    assert len(page.images) > 20
    run = open_page(demo / "realtime_sft/report.html")  # written again after the evaluation
    f1 = after["realtime_sft/video", "decision F1"]["value"]
    assert ["realtime_sft/video", "decision F1", f"{f1:.3f}"] in [
        row[:3] for table in run.tables for row in table
    ]
    assert page.captions == [
        "realtime_sft: loss per label", "realtime_sft: validation accuracy",
    ]  # fmt: skip


def test_every_command_is_on_the_page_and_works_by_itself(demo: Path, page: Page) -> None:
    parts = json.loads((demo / "demo.json").read_text())
    *shown, last = [part["command"] for part in parts]
    assert page.commands == shown  # the last one writes the page
    assert last == f"python -m tools.demo.report {demo}"
    assert any(c.startswith("torchrun --nproc-per-node 1 -m moss_train stage=") for c in shown)
    (command,) = (shlex.split(c) for c in shown if "tools.demo.narrate" in c)
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1].startswith("00:00  A")


def test_what_is_finished_is_not_done_again(demo: Path) -> None:
    record = (demo / "demo.json").read_text()
    assert main(["--out", str(demo), *SIZES]) == 0
    assert (demo / "demo.json").read_text() == record


def test_a_part_that_fails_ends_the_demo_and_says_how_far_it_came(tmp_path: Path, capsys) -> None:
    parts = [
        Part("one", "tests.workers.command", ("0",), 100),
        Part("two", "tests.workers.command", ("3",), 50),
        Part("three", "tests.workers.command", ("0",), 25),
    ]
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        run_all(parts, tmp_path / "demo.json")
    first, second = (line for line in capsys.readouterr().out.splitlines() if line)
    assert first == "--- 1/3 one (about 100 s, 2:55 to the end of the demo)"
    assert second.startswith("--- 2/3 two (about ")
    (done,) = json.loads((tmp_path / "demo.json").read_text())
    assert (done["name"], done["command"]) == ("one", "python -m tests.workers.command 0")


def test_packed_weights_are_small_and_come_back_within_half_a_step(tmp_path: Path) -> None:
    assert (SHIPPED / WEIGHTS).stat().st_size < 2_000_000
    torch.manual_seed(0)
    weights = {"a": torch.randn(40, 30), "conv": torch.randn(8, 3, 5, 5), "norm": torch.ones(30)}
    export = tmp_path / "export"
    export.mkdir()
    save_file(weights, export / "model-00001-of-00001.safetensors")
    for name in FILES:
        (export / name).write_text("{}")
    pack(export, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == weights.keys()
    assert torch.equal(back["norm"], weights["norm"])
    for name in ("a", "conv"):
        step = weights[name].abs().flatten(1).amax(1) / 63
        error = (back[name] - weights[name]).abs().flatten(1).amax(1)
        assert (error <= 0.51 * step + 1e-3 * 63 * step).all()
        assert error.max() > 0


def test_a_sentence_is_as_late_as_it_begins_after_its_event() -> None:
    """Of three events the first is told at once, the second two seconds late, the third never."""
    timeline = {
        "seconds": 12,
        "wanted": [[1, "A."], [4, "B."], [9, "C."]],
        "spoken": [[0, "Too soon."], [1, "A."], [2, "A again."], [6, "B."], [8, "Hm."]],
    }
    quiet = {"seconds": 9, "wanted": [], "spoken": [[2, "Hm."]]}
    assert losses_command.lateness([timeline, quiet, timeline]) == [0, 2, 0, 2]


def test_each_loss_is_trained_on_the_same_samples_from_the_same_weights(tmp_path: Path) -> None:
    options = argparse.Namespace(
        out=tmp_path, train=None, heldout=None, ranks=2, scale=1.0, overrides=[]
    )
    trained = [set(part.arguments) for part in compared(options) if part.module == "moss_train"]
    assert len(trained) == len(LOSSES)
    common = trained[0].intersection(*trained)
    for own, (name, fields) in zip(trained, LOSSES.items(), strict=True):
        assert own - common == {*fields, f"run.dir={tmp_path / name}"}


def test_what_is_missing_is_named(tmp_path: Path, capsys) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert f"{tmp_path}/demo.json: No such file" in capsys.readouterr().err
    assert checkpoint.main(["unpack", str(tmp_path / "out"), str(tmp_path)]) == 1
    assert f"{tmp_path}/weights.npz: No such file" in capsys.readouterr().err
    assert narrate.main([str(tmp_path), str(tmp_path / "clip.mp4")]) == 1
    assert "has no held-out clip with a narration" in capsys.readouterr().err


def scores(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    found = json.loads(path.read_text())["scores"]
    return {(score["source"], score["metric"]): score for score in found}
