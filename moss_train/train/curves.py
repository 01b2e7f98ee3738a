"""Curves over the steps of a run: figures of matplotlib, and SVG for a page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]  # a line of metrics.jsonl
BUCKETS = 250  # a curve of more than twice as many steps is drawn as this many ranges
LIGHT, DARK, OTHER = "#9ecae1", "#08519c", "#d95f0e"


@dataclass(frozen=True)
class Panel:
    """One diagram: its title, and the keys of metrics.jsonl that it shows (`a.b` is nested)."""

    title: str
    keys: tuple[str, ...]
    log: bool = False  # a logarithmic axis where values differ by more than 10 times
    smooth: bool = True
    dots: tuple[str, ...] = ()  # keys with a value in some steps only


PANELS = (
    Panel("loss per label", ("loss", "weighted_loss"), log=True, dots=("validation.loss",)),
    Panel("learning rate", ("lr",), smooth=False),
    Panel("gradient norm before clipping", ("grad_norm",), log=True),
    Panel("validation accuracy", (), dots=("validation.accuracy.all",)),
    Panel("tokens per second, all ranks", ("tokens_per_s",)),
    Panel("frames per second, all ranks", ("frames_per_s",)),
    Panel("model TFLOP/s per rank", ("model_tflops_per_s_per_rank",)),
    Panel("seconds per step; of these waiting for data", ("step_time_s", "data_wait_s")),
    Panel("peak memory of a rank, GB", ("memory_gb",), smooth=False),
)


def number(value: Any) -> float:
    """`value` as a float; NaN where it is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def column(rows: Sequence[Row], key: str) -> list[float]:
    """The values of a key (`validation.loss` is nested); NaN where a row has no number there."""
    return [number(_look_up(row, key)) for row in rows]


def _look_up(row: Row, key: str) -> Any:
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


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


def ranges(
    steps: Sequence[int], values: Sequence[float], buckets: int = BUCKETS
) -> list[tuple[int, float, float]]:
    """Thins a curve out: (middle step, lowest, highest value) of each of at most `buckets` equal
    parts. Values that are not finite are left out, and parts without any other."""
    size = -(-len(steps) // buckets) or 1
    found = []
    for _, group in groupby(range(len(steps)), lambda index: index // size):
        part = list(group)
        finite = [values[index] for index in part if math.isfinite(values[index])]
        if finite:
            found.append((steps[part[len(part) // 2]], min(finite), max(finite)))
    return found


def draw(
    axes: Axes, rows: Sequence[Row], key: str, colors: tuple[str, str], label: str, mean: bool
) -> None:
    """Draws a key of the rows: a thin line (of many steps a band), and a running mean over it."""
    steps, values = [row["step"] for row in rows], column(rows, key)
    if not any(map(math.isfinite, values)):
        return
    light, dark = colors
    window = len(steps) // 20 | 1 if mean else 1  # odd: centred on a step
    if len(steps) > 2 * BUCKETS:
        middle, low, high = zip(*ranges(steps, values), strict=True)
        axes.fill_between(middle, low, high, color=light, linewidth=0.5)
        every = len(steps) // BUCKETS
        axes.plot(steps[::every], smooth(values, window)[::every], color=dark, label=label)
    else:
        marker = "o" if len(steps) < 3 else None  # a line needs two points
        thin, name = (light, None) if window > 1 else (dark, label)
        axes.plot(steps, values, color=thin, linewidth=1, marker=marker, label=name)
        if window > 1:
            axes.plot(steps, smooth(values, window), color=dark, linewidth=1.6, label=label)


def draw_panel(axes: Axes, rows: Sequence[Row], panel: Panel) -> None:
    """Draws a panel into `axes`; its title is the caller's to show."""
    pairs = ((LIGHT, DARK), ("#fdd0a2", OTHER))
    for key, colors in zip(panel.keys, pairs, strict=False):
        draw(axes, rows, key, colors, key, panel.smooth)
    for key in panel.dots:
        values = column(rows, key)
        points = [(r["step"], v) for r, v in zip(rows, values, strict=True) if math.isfinite(v)]
        if points:
            axes.plot(*zip(*points, strict=True), "o--", color=OTHER, markersize=4, label=key)
    finite = [v for key in panel.keys + panel.dots for v in column(rows, key) if math.isfinite(v)]
    if panel.log and finite and 0 < 10 * min(finite) < max(finite):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8)


def loss_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """The loss over the steps, and validation losses where there are some."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per label", title=title)
    draw_panel(axes, rows, PANELS[0])
    return figure


def panel_svgs(rows: Sequence[Row], panels: Sequence[Panel] = PANELS) -> dict[str, str]:
    """`{title: SVG}` of the panels for which the rows have values."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = {}
    for panel in panels:
        keys = panel.keys + panel.dots
        if not any(map(math.isfinite, (v for key in keys for v in column(rows, key)))):
            continue
        figure = Figure(figsize=(4.6, 2.5))
        axes = figure.add_axes((0.13, 0.13, 0.85, 0.84))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        draw_panel(axes, rows, panel)
        found[panel.title] = svg(figure, panel.title)
    return found


def svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for an HTML page: text stays text, nothing is loaded.

    name: another one for each figure of a page, from which the ids in it are made.
    """
    from matplotlib import rc_context

    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    text = out.getvalue()
    # In HTML the element needs no declaration, and scales by its viewBox.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and never referred to
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
