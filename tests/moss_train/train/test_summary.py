"""The closing table of a run, from a real metrics.jsonl."""

from __future__ import annotations

import math

from moss_train.train.report import write_report
from moss_train.train.summary import summary_table
from tests.moss_train.train.runs import write_metrics


def test_the_summary_lists_what_was_written_where_and_how_much(tmp_path):
    write_metrics(tmp_path, [3.0, 2.0, 1.5])
    write_report(tmp_path)
    for step, size in ((2, 1500), (3, 2_500_000)):
        (tmp_path / "checkpoints" / f"step_{step}" / "deep").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step}" / "deep" / "weights").write_bytes(bytes(size))
    lines = summary_table(tmp_path, {"checkpoints/step_*": "checkpoint"}).splitlines()
    assert lines[:9] == [
        "steps    1 to 3",
        "loss     3.0000 -> 1.5000",
        "samples  24 (2 skipped: bad_json 2; 0 cut)",
        "labels   300 (0 more cut away)",
        "turns    30 of the assistant (0 masked)",
        "frames   48",
        "time     0:00:02",
        "epochs   0.75 of toy",
        "",
    ]
    assert lines[9].split() == ["path", "what", "size"]
    rows = [line.split() for line in lines[11:]]
    assert [row[0] for row in rows] == [
        str(tmp_path / name)
        for name in ("metrics.jsonl", "report.html", "checkpoints/step_2", "checkpoints/step_3")
    ]
    assert [row[-2:] for row in rows[2:]] == [["1.5", "kB"], ["2.5", "MB"]]
    assert len({len(line) for line in lines[9:]}) == 1  # columns are aligned


def test_the_summary_of_a_run_that_stopped_early(tmp_path):
    assert summary_table(tmp_path).splitlines()[0] == "no step was finished"
    write_metrics(tmp_path, [math.nan])
    assert "loss     not finite -> not finite" in summary_table(tmp_path)
