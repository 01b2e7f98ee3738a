"""The page of a run, from real metrics: its numbers are those of metrics.jsonl."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from moss_train.config import Config, RunConfig, to_dict
from moss_train.data_config import DataConfig, SourceConfig
from moss_train.hardware import peak_tflops_of
from moss_train.train.curves import loss_figure, ranges, smooth
from moss_train.train.metrics import read_metrics
from moss_train.train.report import main, write_report, write_report_or_warn
from tests.moss_train.train.runs import write_metrics
from tests.pages import open_page


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "pt1 <toy>"
    write_metrics(folder, [5 * math.exp(-step / 40) + 0.3 * math.sin(step) for step in range(200)])
    return folder


def test_the_page_shows_what_metrics_hold(run_dir):
    page = open_page(write_report(run_dir))
    rows = read_metrics(run_dir)
    tenth = sum(row["loss"] for row in rows[-20:]) / 20
    first, last = rows[0]["loss"], rows[-1]["loss"]
    assert page.row("loss per label") == [f"{v:.4f}" for v in (first, last, tenth)]
    assert page.row("learning rate") == ["1.00e-06", "2.00e-05", "2.00e-05"]
    assert page.row("tokens") == ["1,000.0", "tokens/s, all ranks"]
    assert page.row("samples")[0] == "16.0"
    assert page.row("toy")[-1] == "50.00"  # 200 steps of a quarter
    assert "steps 1 to 200" in page.text
    assert "0:01:40" in page.text
    assert "100 of 1,700 (5.9%) samples were skipped: bad_json 100." in page.text
    assert page.row("samples skipped") == ["100", "1,700", "5.88"]
    assert page.row("turns masked") == ["0", "2,000", "0.00"]
    assert "pt1 <toy>" in page.text  # escaped, not a tag
    assert page.commands == [f"python -m moss_train.train.report {run_dir}"]


def test_every_curve_has_its_diagram_with_numbers_at_its_axes(run_dir):
    page = open_page(write_report(run_dir))
    assert page.captions == [
        "loss per label", "learning rate", "gradient norm before clipping",
        "tokens per second, all ranks", "frames per second, all ranks", "model TFLOP/s per rank",
        "seconds per step; of these waiting for data", "peak memory of a rank, GB",
    ]  # fmt: skip
    assert len(page.svgs) == 8
    assert {"0", "40", "80", "120", "160", "200"} <= set(page.svgs[0])
    assert {"step_time_s", "data_wait_s"} <= set(page.svgs[6])


def test_configuration_data_and_scores_are_shown(run_dir):
    sources = [
        SourceConfig("toy", "/a", "video", weight=3.0),
        SourceConfig("other", "/b", "video", weight=1.0),
    ]
    data = DataConfig(sources=sources, samples=4000, global_batch=8, tokenizer="t")
    config = Config(run=RunConfig(dir=str(run_dir)), data=data)
    config.model.dtype = "bf16"
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    described = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}
    (run_dir / "run.json").write_text(json.dumps(described))
    score = {"source": "sft/video", "metric": "answers exact", "value": 0.5, "blind": 0.25,
             "chance": None, "count": 20}  # fmt: skip
    sample = {"key": "video-1", "asked": "What?", "wanted": "A circle.", "said": "A <b>square</b>."}
    later = [sample | {"key": f"video-{number}"} for number in range(2, 20)]
    found = {"step": 200, "scores": [score], "samples": [sample, *later]}
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    page = open_page(write_report(run_dir))
    assert page.row("toy") == ["video", "75 %", "50.00"]
    assert page.row("other") == ["video", "25 %", "-"]
    assert "Stopped after step 200 of 500" in page.text
    assert page.row("sft/video") == ["answers exact", "0.500", "0.250", "", "20"]
    assert page.row("video-1") == ["What?", "A circle.", "A <b>square</b>."]
    assert "video-8" in page.text
    assert "video-9" not in page.text  # the first eight are shown
    # 0.1 of 989.4 TFLOP/s
    assert page.row("MFU") == ["0.0", "% of 989.4 TFLOP/s"]
    assert open_page(write_report(run_dir, peak_tflops=0.4)).row("MFU")[0] == "25.0"


def test_peaks_are_those_of_the_data_sheets():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100-SXM4-80GB")
    assert [peak_tflops_of(name) for name in names] == [989.4, 756.0, 989.4, 312.0]
    more = ("NVIDIA L40S", "NVIDIA L40", "NVIDIA L4", "NVIDIA H100 NVL", "NVIDIA GH200 480GB")
    assert [peak_tflops_of(name) for name in more] == [362.0, 181.0, 121.0, 835.5, 989.4]
    assert peak_tflops_of("NVIDIA H200 NVL") == 835.5
    others = ("CPU", "NVIDIA RTX A1000", "NVIDIA H20", "NVIDIA L400")  # measured, not guessed
    assert [peak_tflops_of(name) for name in others] == [None] * 4
    # A seventh of the GPU is not slow for having a seventh of its speed.
    assert peak_tflops_of("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None


def test_a_long_run_is_a_small_page_soon(tmp_path):
    write_metrics(tmp_path, [3 + math.sin(step / 7) for step in range(10_000)])
    started = time.process_time()
    path = write_report(tmp_path)
    assert time.process_time() - started < 5  # about 1.5 s
    assert path.stat().st_size < 600_000
    assert len(open_page(path).svgs) == 8


@pytest.mark.parametrize("losses", [[3.0], [3.0, 2.0], [3.0, math.nan, 2.0], [math.nan]])
def test_short_runs_and_losses_that_are_not_finite_are_drawn(tmp_path, losses):
    write_metrics(tmp_path, losses)
    page = open_page(write_report(tmp_path))
    shown = [f"{v:.4f}" if math.isfinite(v) else "-" for v in (losses[0], losses[-1])]
    assert page.row("loss per label")[:2] == shown
    strange = sum(map(math.isnan, losses))
    assert (f"The loss of {strange} of {len(losses)} steps" in page.text) == (strange > 0)


def test_rows_with_few_keys_are_shown(tmp_path):
    lines = [{"step": 1}, {"step": 2, "loss": 1.0, "epochs": None}, {"step": 3, "lr": "x"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("model: {name: 3, unknown: [}")
    (tmp_path / "run.json").write_text("[]")
    page = open_page(write_report(tmp_path))
    assert page.captions == ["loss per label"]
    assert page.row("loss per label") == ["-", "-", "-"]
    assert page.row("step") == ["-", "s"]


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    write_report_or_warn(tmp_path / "none")
    assert "report.html was not written" in caplog.text
    assert "has no steps" in caplog.text


def test_the_command_writes_the_page_or_says_why_not(run_dir, tmp_path, capsys):
    command = [sys.executable, "-m", "moss_train.train.report", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == run_dir / "report.html"
    assert main([str(tmp_path / "none")]) == 1
    assert "metrics.jsonl: has no steps: give a run folder" in capsys.readouterr().err


def test_smoothing_is_centred_and_skips_what_is_not_finite():
    assert smooth([1.0, 2.0, 6.0, 4.0, 9.0], 3) == pytest.approx([1.0, 3.0, 4.0, 19 / 3, 9.0])
    line = [float(value) for value in range(20)]
    assert smooth(line, 7) == pytest.approx(line)  # no lag, no bend at the ends
    assert smooth([3.0, 5.0], 1) == [3.0, 5.0]
    assert smooth([1.0, math.nan, 4.0], 3)[1] == pytest.approx(2.5)
    assert smooth([1.0, math.inf, 4.0], 3)[1] == pytest.approx(2.5)
    assert math.isnan(smooth([math.nan, 1.0], 3)[0])


def test_a_thinned_curve_keeps_its_extremes():
    values = [0.0, 5.0, 1.0, math.nan, 2.0, -7.0, math.nan, math.nan]
    steps = list(range(1, 9))
    assert ranges(steps, values, 4) == [(2, 0.0, 5.0), (4, 1.0, 1.0), (6, -7.0, 2.0)]


def test_the_loss_figure_holds_the_losses(tmp_path):
    write_metrics(tmp_path, [3.0, 2.0, 1.5])
    (axes,) = loss_figure(read_metrics(tmp_path), "a run").axes
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [3.0, 2.0, 1.5]
