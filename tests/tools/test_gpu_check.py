"""tools.gpu_check on a CPU: every section runs, what is wrong is found, what is done is kept."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from data_pipeline import devices, fp8
from moss_train.train.trace import summarize
from tests.moss_train.train.runs import is_running
from tests.torchrun import REPO
from tests.waiting import PATIENCE, running, until
from tools.gpu_check import preflight, workbench
from tools.gpu_check.__main__ import main
from tools.gpu_check.bounded import run_bounded
from tools.gpu_check.cases import CASES
from tools.gpu_check.report import PAGE, last_measured, report
from tools.gpu_check.sections import (
    CPU_LOSSES,
    GPU_LOSSES,
    LIMITS,
    compare_losses,
    run_section,
)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[int, Path]:
    """The exit code of a rehearsal, and its folder."""
    out = tmp_path_factory.mktemp("check")
    return main(["--rehearse", "--out", str(out)]), out


def test_every_section_is_rehearsed_and_correct(rehearsed):
    code, out = rehearsed
    found = json.loads((out / "all.json").read_text())
    assert code == 0
    assert list(found) == list(LIMITS)
    assert all(section["correct"] for section in found.values())
    assert max(found[GPU_LOSSES]["apart"].values()) == 0  # here both are the CPU
    assert found["resume"]["resumed"] == found["resume"]["losses"]
    for name in CASES:
        case = found[name]
        assert case["step_s"] > 0
        assert case["tflop"] > 0
        assert case["profile"]["launches"] > 100
    assert found["pt1"]["frames"] == 4
    assert found["short"]["tokens"] == found["decoder"]["tokens"] / 2 == 64


def test_what_is_done_is_kept_and_what_is_wrong_fails(rehearsed, capsys):
    _, out = rehearsed
    path = out / "decoder.json"
    found = json.loads(path.read_text())
    failed = {"correct": False, "error": "not done within 120 s", "setting": found["setting"]}
    path.write_text(json.dumps(failed))
    assert main(["--rehearse", "--out", str(out), "--sections", "decoder"]) == 1
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("decoder  "))
    assert line.split(maxsplit=2) == ["decoder", "WRONG", "not done within 120 s"]
    path.write_text(json.dumps(found))
    assert main(["--rehearse", "--out", str(out), "--sections", "decoder"]) == 0
    assert json.loads(path.read_text()) == found


def test_what_another_device_or_other_code_has_done_is_done_again(rehearsed, capsys):
    """Else a GPU's run after a rehearsal would find all done, and call the CPU's findings its."""
    _, out = rehearsed
    path, other = out / "decoder.json", out / "resume.json"
    kept = {file: file.read_text() for file in (path, other)}
    found = json.loads(kept[path])
    for changed in ({"device": "NVIDIA H200"}, {"code": "0123456789abcdef"}, {"torch": "2.11.0"}):
        for file in kept:
            setting = {**found["setting"], **changed}
            file.write_text(json.dumps({"correct": True, "losses": [1.0], "setting": setting}))
        assert main(["--rehearse", "--out", str(out), "--sections", "decoder"]) == 0
        again = json.loads(path.read_text())
        assert again["setting"] == found["setting"]
        assert again["losses"] == found["losses"]
        said = capsys.readouterr().out
        assert f"resume: left out: {other} is of another device, or of other code" in said
        assert "resume" not in json.loads((out / "all.json").read_text())
    for file, text in kept.items():
        file.write_text(text)


def test_large_models_are_drawn_such_that_gradients_reach_all_that_trains(monkeypatch):
    """As at the sizes of the 11B model, whose weights are drawn on the device. With gates of 0 the
    gradient of the projector was 0, and a step that learned nothing was correct."""
    monkeypatch.setattr(workbench, "DRAWN_ON_THE_CPU", 0)
    drawn = workbench._draw
    found = run_section("pt1", "cpu", True)
    assert min(found["grad_norms"]) > 1e-3
    assert found["losses"][1] < found["losses"][0]
    assert found["correct"]

    def closed(model) -> None:
        drawn(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("attn_gate", "mlp_gate")):
                    parameter.zero_()

    monkeypatch.setattr(workbench, "_draw", closed)
    assert not run_section("pt1", "cpu", True)["correct"]


def test_nothing_is_left_of_a_section_that_takes_too_long(tmp_path, monkeypatch):
    """A save has written tens of gigabytes then, by processes that go on."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    writer = tmp_path / "section"
    writer.write_text(f"#!/bin/sh\nmktemp\nsleep 1000 &\necho $! > {tmp_path}/pid\nwait\n")
    writer.chmod(writer.stat().st_mode | stat.S_IXUSR)
    for limit in (3, 30, 300):  # seconds in which it can have started, on a busy machine
        assert run_bounded([str(writer)], tmp_path / "log", limit) is None
        if (tmp_path / "pid").exists():
            break
    assert (tmp_path / "log").read_text().startswith(str(tmp_path / "tmp"))
    assert list((tmp_path / "tmp").iterdir()) == []
    until(lambda: not is_running(int((tmp_path / "pid").read_text())))
    command = [sys.executable, "-c", "import sys; print('done'); sys.exit(3)"]
    assert run_bounded(command, tmp_path / "log", 60) == 3
    assert (tmp_path / "log").read_text() == "done\n"


BOUNDED = """
import sys
from pathlib import Path
from tools.gpu_check.bounded import run_bounded

run_bounded(["sh", "-c", sys.argv[1]], Path("log"), 600)
"""


def test_a_check_that_is_ended_leaves_nothing_of_its_section(tmp_path):
    """As `timeout` and a batch system end it: the section has a session of its own."""
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(REPO)}
    section = "mktemp; sleep 1000 & echo $! > new; mv new pid; wait"
    command = [sys.executable, "-c", BOUNDED, section]
    with running(command, cwd=tmp_path, env=environment) as check:
        until(lambda: (tmp_path / "pid").exists())
        assert len(list((tmp_path / "tmp").iterdir())) == 1
        check.send_signal(signal.SIGTERM)
        assert check.wait(PATIENCE) == 128 + signal.SIGTERM
    until(lambda: not is_running(int((tmp_path / "pid").read_text())))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_a_gpu_it_says_so(tmp_path, capsys, groups):
    assert main(["--out", str(tmp_path / "none")]) == 1
    assert "torch finds no CUDA device: try --rehearse" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_products_in_fp8_are_timed_where_a_gpu_has_them(monkeypatch):
    """As on such a GPU; its product is a CPU's, or there is none with a scale for each row."""
    monkeypatch.setattr(devices, "has_fp8", lambda _: True)
    monkeypatch.setattr(fp8, "is_accelerator", lambda _: True)
    shape, device = (64, 32, 48), torch.device("cpu")
    assert preflight.product(shape, device)["fp8_tflops"] > 0

    def missing(*_, **__):
        raise RuntimeError("no scales of rows")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    assert preflight.product(shape, device).keys() == {"bf16_tflops", "error"}


def test_losses_that_differ_are_wrong():
    def findings(loss: float) -> dict:
        sides = {CPU_LOSSES: [2.0, 1.0], GPU_LOSSES: [2.0, loss]}
        return {name: {"correct": True, "losses": {"pt1": x}} for name, x in sides.items()}

    for loss, correct in ((1.00009, True), (1.0002, False), (math.nan, False)):
        found = findings(loss)
        compare_losses(found)
        assert found[GPU_LOSSES]["correct"] == correct
        apart = found[GPU_LOSSES]["apart"]["pt1"]
        assert apart == pytest.approx(loss - 1.0, nan_ok=True)


def test_the_pages_table_is_what_steps_are_compared_with(rehearsed):
    before = last_measured(PAGE.read_text())
    assert before["pt1"] == 1.97
    assert set(before) <= set(CASES)
    page = (
        "## Last measured\n| `pt1` | 4 s | 1 |\n| `short` | - | 1 |\n## Next\n| `decoder` | 1 s |"
    )
    assert last_measured(page) == {"pt1": 4.0}
    found = json.loads((rehearsed[1] / "all.json").read_text())
    found = {"pt1": {**found["pt1"], "step_s": 2.0}}
    (line,) = (x for x in report(found, page).splitlines() if "(2.00x)" in x)
    assert line.split()[:4] == ["pt1", "2", "4", "(2.00x)"]


def test_a_profile_counts_what_overlaps_once():
    seen = summarize([("b", 2.0, 4.0), ("a", 0.0, 1.0), ("c", 3.0, 3.5), ("a", 6.0, 8.0)])
    assert seen.span_ms == 8.0
    assert seen.busy_ms == 1.0 + 2.0 + 2.0
    assert seen.idle == pytest.approx(3 / 8)
    assert seen.top == [("a", 3.0, 2), ("b", 2.0, 1), ("c", 0.5, 1)]
    assert seen.gaps == [(2.0, "b", "a"), (1.0, "a", "b")]
    assert summarize([]).idle == 0
