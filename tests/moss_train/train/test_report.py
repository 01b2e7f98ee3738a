"""The loss plot and the closing table, from a real metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib import image

from moss_train.config import LoggerConfig
from moss_train.train.metrics import MetricsWriter, StepMetrics
from moss_train.train.report import plot_losses, smooth, summary_table


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "pt1-toy"
    write(folder, [5 * math.exp(-step / 40) + 0.3 * math.sin(step) for step in range(200)])
    return folder


def write(folder: Path, losses: list[float]) -> None:
    with MetricsWriter(folder, LoggerConfig(), {}) as writer:
        for step, loss in enumerate(losses, start=1):
            writer.write(
                StepMetrics(
                    step=step, loss=loss, lr=2e-5 * min(1.0, step / 20), grad_norm=1.0,
                    samples=8, tokens=500, frames=16, step_time_s=0.5,
                    model_tflops_per_s_per_rank=0.1, memory_gb=1.0, data_wait_s=0.0,
                    skipped_samples=step % 2, skipped_steps=0, frames_per_rank_max=8,
                    frames_per_rank_mean=8.0, padding_ratio=0.2,
                    epochs={"toy": 0.25 * step},
                )
            )  # fmt: skip


def test_the_plot_is_a_picture_with_both_curves(run_dir):
    path = plot_losses(run_dir)
    assert path == run_dir / "loss.png"
    pixels = image.imread(path)[..., :3]
    assert pixels.shape == (750, 1350, 3)
    for color in ((0x9E, 0xCA, 0xE1), (0x08, 0x51, 0x9C), (0xD9, 0x5F, 0x0E)):
        distance = abs(pixels - [channel / 255 for channel in color]).max(axis=2)
        assert (distance < 0.02).sum() > 200


@pytest.mark.parametrize("losses", [[3.0], [3.0, 2.0], [3.0, math.nan, 2.0], [math.nan]])
def test_short_runs_and_losses_that_are_not_finite_are_drawn(tmp_path, losses):
    write(tmp_path, losses)
    assert plot_losses(tmp_path).stat().st_size > 10_000


def test_a_run_without_steps_has_no_plot(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no steps to plot"):
        plot_losses(tmp_path)


def test_smoothing_is_centred_and_skips_what_is_not_finite():
    assert smooth([1.0, 2.0, 6.0, 4.0, 9.0], 3) == pytest.approx([1.0, 3.0, 4.0, 19 / 3, 9.0])
    line = [float(value) for value in range(20)]
    assert smooth(line, 7) == pytest.approx(line)  # no lag, no bend at the ends
    assert smooth([3.0, 5.0], 1) == [3.0, 5.0]
    assert smooth([1.0, math.nan, 4.0], 3)[1] == pytest.approx(2.5)
    assert smooth([1.0, math.inf, 4.0], 3)[1] == pytest.approx(2.5)
    assert math.isnan(smooth([math.nan, 1.0], 3)[0])


def test_the_summary_lists_what_was_written_where_and_how_much(tmp_path):
    write(tmp_path, [3.0, 2.0, 1.5])
    plot_losses(tmp_path)
    for step, size in ((2, 1500), (3, 2_500_000)):
        (tmp_path / "checkpoints" / f"step_{step}" / "deep").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step}" / "deep" / "weights").write_bytes(bytes(size))
    lines = summary_table(tmp_path, {"checkpoints/step_*": "checkpoint"}).splitlines()
    assert lines[:7] == [
        "steps    1 to 3",
        "loss     3.0000 -> 1.5000",
        "samples  24 (2 skipped)",
        "frames   48",
        "time     0:00:02",
        "epochs   0.75 of toy",
        "",
    ]
    assert lines[7].split() == ["path", "what", "size"]
    rows = [line.split() for line in lines[9:]]
    assert [row[0] for row in rows] == [
        str(tmp_path / name)
        for name in ("metrics.jsonl", "loss.png", "checkpoints/step_2", "checkpoints/step_3")
    ]
    assert [row[-2:] for row in rows[2:]] == [["1.5", "kB"], ["2.5", "MB"]]
    assert len({len(line) for line in lines[7:]}) == 1  # columns are aligned


def test_the_summary_of_a_run_that_stopped_early(tmp_path):
    assert summary_table(tmp_path).splitlines()[0] == "no step was finished"
    write(tmp_path, [math.nan])
    assert "loss     not finite -> not finite" in summary_table(tmp_path)
