"""After a run: what it has done, and a table of what was written where."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from data_pipeline.tables import format_table
from moss_train.storage import or_warning
from moss_train.train.goodput import goodput_line, spent
from moss_train.train.guard import BAD_STEPS_FILE
from moss_train.train.history import HISTORY_FILE, read_history
from moss_train.train.metrics import METRICS_FILE, TENSORBOARD_DIR, read_metrics
from moss_train.train.report import REPORT_FILE
from moss_train.train.unlearned import Totals, lines

WRITTEN = {
    METRICS_FILE: "metrics, one JSON object a step",
    HISTORY_FILE: "each start and end of a job",
    REPORT_FILE: "curves, speed, data and scores on a page",
    TENSORBOARD_DIR: "TensorBoard",
    "wandb": "Weights & Biases",
}


# What a job writes beside them.
JOB_FILES = {
    "config.yaml": "configuration",
    "run.json": "configuration, versions, commit, layout, parameters",
    "checkpoints/step_*": "checkpoint",
    "audit.*.jsonl": "sample keys of each step",
    BAD_STEPS_FILE: "steps left out, with their sample keys",
}


def print_summary(run_dir: Path, console: TextIO | None = None) -> None:
    """Prints what a job has done and written, to `console` (None: stdout), at its end."""
    table = summary_table(run_dir, JOB_FILES)
    with or_warning("the table of the run"):
        print(table, file=console, flush=True)


def summary_table(run_dir: Path, written: Mapping[str, str] | None = None) -> str:
    """What the run has done, and a table of what it wrote: path, what, size.

    Args:
        written: what else to list: a path or glob pattern inside `run_dir` -> what it is, as in
            `{"checkpoints/step_*": "checkpoint"}`. A folder's size is that of its files.

    Returns:
        Lines of text. Samples, frames and time are sums over all steps, of earlier processes of
        the run too.
    """
    found = [
        (str(path), what, _size(path))
        for pattern, what in (WRITTEN | dict(written or {})).items()
        for path in sorted(run_dir.glob(pattern))
    ]
    table = format_table([("path", "what", "size"), *found], "llr", rule=True)
    return "\n".join([*_totals(run_dir), "", table])


def _totals(run_dir: Path) -> list[str]:
    rows, history = read_metrics(run_dir), read_history(run_dir)
    if not rows:
        return ["no step was finished"]
    first, last = rows[0], rows[-1]
    sums = {key: sum(row[key] for row in rows) for key in ("frames", "step_time_s")}
    return [
        f"steps    {first['step']} to {last['step']}",
        f"loss     {_number(first['loss'])} -> {_number(last['loss'])}",
        *lines(Totals.of(rows)),
        f"frames   {sums['frames']:,}",
        f"time     {timedelta(seconds=round(sums['step_time_s']))}",
        *(f"goodput  {goodput_line(seconds)}" for seconds in [spent(history, rows)] if seconds),
        *(f"epochs   {epochs:.2f} of {source}" for source, epochs in last["epochs"].items()),
    ]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = float(sum(file.stat().st_size for file in files))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
