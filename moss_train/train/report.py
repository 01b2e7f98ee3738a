"""After a run: the loss plot, and a table of what was written where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from moss_train.train.metrics import METRICS_FILE, TENSORBOARD_DIR, read_metrics

PLOT_FILE = "loss.png"
WRITTEN = {
    METRICS_FILE: "metrics, one JSON object a step",
    PLOT_FILE: "loss and learning rate",
    TENSORBOARD_DIR: "TensorBoard",
    "wandb": "Weights & Biases",
}


def plot_losses(run_dir: Path) -> Path:
    """Draws `run_dir`/loss.png from metrics.jsonl: loss, smoothed loss, learning rate.

    Raises:
        ValueError: there is no step to draw, or matplotlib is not installed.
    """
    rows = read_metrics(run_dir)
    if not rows:
        raise ValueError(f"{run_dir / METRICS_FILE} has no steps to plot")
    if find_spec("matplotlib") is None:
        raise ValueError("the loss plot needs the package matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = [row["step"] for row in rows]
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    window = len(steps) // 20 | 1  # odd: centred on a step
    marker = "o" if len(steps) < 3 else None  # a line needs two points

    figure = Figure(figsize=(9, 5), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    curves = left.plot(steps, losses, color="#9ecae1", lw=1, marker=marker, label="loss")
    if window > 1:
        smoothed = smooth(losses, window)
        label = f"loss, mean of {window} steps"
        curves += left.plot(steps, smoothed, color="#08519c", lw=2, label=label)
    rates = [row["lr"] for row in rows]
    curves += right.plot(steps, rates, "--", color="#d95f0e", marker=marker, label="learning rate")
    left.set_title(f"Training loss of {run_dir.resolve().name}")
    left.set_xlabel("step")
    left.set_ylabel("loss per label")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.3)
    right.set_ylabel("learning rate")
    right.set_ylim(bottom=0)
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    left.legend(handles=curves, loc="upper right")
    path = run_dir / PLOT_FILE
    figure.savefig(path, dpi=150)
    return path


def smooth(values: list[float], window: int) -> list[float]:
    """Centred running mean of `window` values; towards both ends the window shrinks, so that the
    curve neither lags nor bends. Values that are not finite are left out; NaN where none is left.
    """
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    sums = [0.0, *accumulate(finite)]
    counts = [0, *accumulate(map(math.isfinite, values))]
    means = []
    for index in range(len(values)):
        half = min(window // 2, index, len(values) - 1 - index)
        first, last = index - half, index + half + 1
        count = counts[last] - counts[first]
        means.append((sums[last] - sums[first]) / count if count else math.nan)
    return means


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
    return "\n".join([*_totals(run_dir), "", *_table([("path", "what", "size"), *found])])


def _totals(run_dir: Path) -> list[str]:
    rows = read_metrics(run_dir)
    if not rows:
        return ["no step was finished"]
    first, last = rows[0], rows[-1]
    keys = ("samples", "skipped_samples", "frames", "step_time_s")
    sums = {key: sum(row[key] for row in rows) for key in keys}
    return [
        f"steps    {first['step']} to {last['step']}",
        f"loss     {_number(first['loss'])} -> {_number(last['loss'])}",
        f"samples  {sums['samples']:,} ({sums['skipped_samples']:,} skipped)",
        f"frames   {sums['frames']:,}",
        f"time     {timedelta(seconds=round(sums['step_time_s']))}",
        *(f"epochs   {epochs:.2f} of {source}" for source, epochs in last["epochs"].items()),
    ]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    path, what, size = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [f"{row[0]:<{path}}  {row[1]:<{what}}  {row[2]:>{size}}" for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = float(sum(file.stat().st_size for file in files))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
