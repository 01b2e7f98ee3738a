"""`python -m tools.runs compare`: what differs, last values, a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib import image

from tools.runs import main


def make_run(folder: Path, lr: float, losses: list[float | None], validation: float | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"optimizer: {{lr: {lr}}}\ndata: {{global_batch: 4}}\n")
    rows = [{"step": n + 1, "loss": loss, "lr": lr} for n, loss in enumerate(losses)]
    if validation is not None:
        rows[-1]["validation"] = {"loss": validation}  # type: ignore[assignment]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_differences_and_last_values(tmp_path, capsys):
    one = make_run(tmp_path / "one", 0.001, [3.0, 2.0, 2.5], None)
    two = make_run(tmp_path / "two", 0.01, [3.0, None, 1.25], 1.5)
    (two / "run.json").write_text(json.dumps({"config": {"x": 1}, "versions": {"torch": "2.13"}}))
    assert main(["compare", str(one), str(two), "--out", str(tmp_path / "plot.png")]) == 0
    said = capsys.readouterr().out
    cells = [line.split() for line in said.splitlines()]
    assert ["differs", "one", "two"] in cells
    assert ["optimizer.lr", "0.001", "0.01"] in cells
    assert ["versions.torch", "-", "2.13"] in cells
    assert not any("global_batch" in line or line.startswith("x ") for line in said.splitlines())
    assert ["loss", "2.5", "1.25"] in cells
    assert ["lowest", "loss", "2", "1.25"] in cells
    assert ["validation.loss", "-", "1.5"] in cells
    assert image.imread(tmp_path / "plot.png").shape[:2] == (750, 1350)


def test_a_loss_that_is_not_finite_is_not_replaced_by_an_earlier_one(tmp_path, capsys):
    one = make_run(tmp_path / "one", 0.001, [3.0, 2.0, None], None)
    two = make_run(tmp_path / "two", 0.01, [None, None], None)
    assert main(["compare", str(one), str(two), "--out", str(tmp_path / "plot.png")]) == 0
    said = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"loss not finite not finite", "lowest loss 2 not finite"} <= said


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_that_is_no_run_is_named(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == (
        f"python -m tools.runs: error: {tmp_path / name}: no steps in metrics.jsonl: "
        "give a run folder\n"
    )
