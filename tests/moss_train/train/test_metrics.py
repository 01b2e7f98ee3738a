"""metrics.jsonl and the console line."""

from __future__ import annotations

import io
import json
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moss_train.log import log
from moss_train.train.metrics import (
    GROUPS,
    MetricsWriter,
    StepLine,
    StepMetrics,
    logged_values,
    progress_line,
    read_metrics,
)


def step_metrics(step: int = 1, loss: float = 2.5, step_time_s: float = 2.0) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=loss,
        lr=2e-5,
        grad_norm=0.75,
        samples=8,
        tokens=3000,
        labels=900,
        frames=64,
        turns=20,
        masked_turns=3,
        truncated_samples=1,
        truncated_labels=7,
        step_time_s=step_time_s,
        model_tflops_per_s_per_rank=0.125,
        memory_gb=1.5,
        data_wait_s=0.25,
        skipped_samples=1,
        skipped_reasons={"bad_json": 1},
        skipped_steps=2,
        frames_per_rank_max=40,
        frames_per_rank_mean=32.0,
        padding_ratio=0.1,
        epochs={"toy": 0.5},
    )


def write_steps(run_dir: Path, first: int, last: int, resume_step: int = 0, loss: float = 2.5):
    writer = MetricsWriter(run_dir, resume_step=resume_step)
    for step in range(first, last + 1):
        writer.write(step_metrics(step, loss))


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir)]


def test_a_line_holds_every_number_and_the_rates_made_from_them(tmp_path):
    write_steps(tmp_path, 1, 1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    expected = asdict(step_metrics())
    for name in ("weighted_loss", "validation", "suites", "mfu", "hfu"):  # where measured
        assert expected.pop(name) is None
    assert row == expected
    assert (row["samples_per_s"], row["tokens_per_s"], row["frames_per_s"]) == (4.0, 1500.0, 32.0)


def test_each_step_can_be_read_before_the_next(tmp_path):
    writer = MetricsWriter(tmp_path / "new" / "run")
    for step in (1, 2, 3):
        writer.write(step_metrics(step))
        assert steps(tmp_path / "new" / "run") == list(range(1, step + 1))


def test_a_loss_that_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    for step, loss in ((1, math.nan), (2, math.inf)):
        write_steps(tmp_path, step, step, resume_step=step - 1, loss=loss)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert [row["loss"] for row in read_metrics(tmp_path)] == [None, None]


def test_a_validation_that_is_not_finite_ends_no_job(tmp_path):
    """A model whose held-out losses overflow still trains; its line is JSON."""
    measured = {"loss": math.nan, "source": {"a": math.inf, "b": 2.5}, "samples": 3}
    suites = {"clips": {"caption token accuracy": math.nan}}
    MetricsWriter(tmp_path).write(replace(step_metrics(), validation=measured, suites=suites))
    (row,) = read_metrics(tmp_path)
    assert row["validation"] == {"loss": None, "source": {"a": None, "b": 2.5}, "samples": 3}
    assert row["suites"] == {"clips": {"caption token accuracy": None}}


def test_a_resumed_run_repeats_no_step(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 9, resume_step=4, loss=1.0)
    assert steps(tmp_path) == list(range(1, 10))
    assert [row["loss"] for row in read_metrics(tmp_path)] == [2.5] * 4 + [1.0] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_resumed_run_keeps_the_lines_before_it_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, 1, 3)
    before, inode = path.read_bytes(), path.stat().st_ino
    write_steps(tmp_path, 4, 5, resume_step=3)
    assert path.read_bytes().startswith(before)
    assert path.stat().st_ino == inode  # nothing to remove: not rewritten


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3', "\0\0\0", '{"loss": 1.0}', "17"])
def test_a_half_written_line_is_dropped_with_a_warning(tmp_path, caplog, tail):
    write_steps(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    with caplog.at_level(logging.WARNING, log.name):
        assert steps(tmp_path) == [1, 2]
    assert "1 line(s) not whole" in caplog.text
    write_steps(tmp_path, 3, 3, resume_step=2)
    assert steps(tmp_path) == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(tmp_path, 1, 2)
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(tmp_path, 3, 3, resume_step=2)
    assert steps(tmp_path) == [1, 2, 3]


def test_no_file_means_no_steps(tmp_path):
    assert read_metrics(tmp_path) == []


def test_every_metric_has_a_group():
    grouped = {name for names in GROUPS.values() for name in names}
    # Named by source, reason or phase.
    assert grouped == set(asdict(step_metrics())) - {
        "step", "epochs", "skipped_reasons", "validation", "suites", "phase_s", "time",
    }  # fmt: skip


def test_where_a_gpu_spends_a_step_is_shown():
    seconds = {"encode": 1.5, "plan": 0.001, "update": 0.249}  # of 2
    measured = replace(step_metrics(), mfu=0.441, hfu=0.5, memory_gb=101.2, phase_s=seconds)
    assert progress_line(measured, 9, 60.0).endswith(
        "tokens/s  MFU 44%  HFU 50%  101 GB  data 12%, encode 75%, update 12%  ETA 01:00"
    )
    assert progress_line(measured, 9, 60.0, 120).endswith(
        "tokens/s MFU 44% HFU 50% 101 GB ETA 01:00"
    )
    assert "MFU" not in progress_line(step_metrics(), 9, 60.0)
    values = logged_values(asdict(measured))
    assert values["speed/mfu"] == 0.441
    assert values["speed/phase_s/encode"] == 1.5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_every_nth_step_and_the_last_are_lines():
    stream = io.StringIO()
    progress = StepLine(total=7, every=3, stream=stream)
    for step in range(1, 8):
        progress.update(step_metrics(step))
    progress.note("saved")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 3/7", "step 6/7", "step 7/7", "saved"]


def test_on_a_terminal_one_line_is_rewritten_and_notes_stand_above_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    stream = Terminal()
    progress = StepLine(total=2, every=10, stream=stream)
    progress.update(step_metrics(1))
    progress.note("saved")
    progress.update(step_metrics(2))
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == 2
    first, last = text.split("\n")[:2]
    assert first.startswith("\rstep 1/2  loss 2.5000")
    assert first.endswith("\r\x1b[Ksaved")
    assert last.startswith("step 1/2")  # the line again, under the note
    assert "\rstep 2/2" in last


def test_the_line_says_everything():
    assert progress_line(step_metrics(12), 200, 83.4) == (
        "step 12/200  loss 2.5000  lr 2.0e-05  grad norm 0.75  4 samples/s  32 frames/s"
        "  1.5k tokens/s  ETA 01:23"
    )
    assert progress_line(step_metrics(12), 200, 3683.0).endswith("  ETA 1:01:23")
    assert progress_line(step_metrics(12), 200, None).endswith("  ETA -")


def test_a_narrow_terminal_drops_what_matters_least():
    def narrow(width: int) -> str:
        return progress_line(step_metrics(12), 200, 83.4, width)

    assert narrow(79) == (
        "12/200 loss 2.5000 lr 2.0e-05 4 samples/s 32 frames/s 1.5k tokens/s ETA 01:23"
    )
    assert narrow(60) == "12/200 loss 2.5000 32 frames/s 1.5k tokens/s ETA 01:23"
    assert narrow(30) == "12/200 loss 2.5000 ETA 01:23"
    assert narrow(20) == "12/200 loss 2.5000"


def test_the_eta_is_the_mean_of_recent_steps_without_the_first():
    progress = StepLine(total=100, stream=io.StringIO())
    progress.update(step_metrics(1, step_time_s=60.0))
    assert progress.eta_s(1) is None
    progress.update(step_metrics(2, step_time_s=1.0))
    progress.update(step_metrics(3, step_time_s=3.0))
    assert progress.eta_s(3) == 97 * 2.0
    for step in range(4, 4 + StepLine.RECENT):
        progress.update(step_metrics(step, step_time_s=0.5))
    assert progress.eta_s(90) == 10 * 0.5


def test_metrics_cannot_be_changed_after_their_rates_are_made():
    with pytest.raises(AttributeError):
        step_metrics().samples = 9  # type: ignore[misc]
    assert replace(step_metrics(), samples=9).samples_per_s == 4.5
