"""Compares training runs: their losses in one plot, where they differ in a table.

The plot has validation losses too, the tables the differing configuration and the last values.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import yaml

from data_pipeline.commands import WRONG_USAGE, CommandParser, describe, report_error
from data_pipeline.tables import format_table
from moss_train.config import flatten
from moss_train.train.curves import smooth
from moss_train.train.metrics import read_metrics

ABSENT, NOT_FINITE = "-", "not finite"
LAST = ("step", "loss", "validation.loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s",
        "skipped_steps", "memory_gb")  # fmt: skip


class Run:
    """A run folder: its configuration and its steps."""

    def __init__(self, folder: Path):
        """Reads the run. Raises ValueError where the folder is not a run's."""
        self.folder, self.name = folder, folder.resolve().name
        self.rows = read_metrics(folder)
        if not self.rows:
            raise ValueError(f"{folder}: no steps in metrics.jsonl: give a run folder")
        config = folder / "config.yaml"
        if not config.is_file():
            raise ValueError(f"{folder}: no config.yaml: give a run folder")
        self.config = dict(flatten(yaml.safe_load(config.read_text())))
        description = folder / "run.json"
        if description.is_file():
            described = json.loads(description.read_text())
            described.pop("config", None)
            self.config |= dict(flatten(described))

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which a key (also nested: `validation.loss`) has a value, and the values."""
        values = [(row["step"], dict(flatten(row)).get(key)) for row in self.rows]
        points = [(step, value) for step, value in values if value is not None]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, key: str) -> str:
        """The last value of a key, which may be none that is finite: not an earlier one, or a run
        that has failed would look well."""
        flat = [dict(flatten(row)) for row in self.rows]
        values = [row[key] for row in flat if key in row]
        if not values:
            return ABSENT
        return _format(values[-1])


def _format(value: float | None) -> str:
    return NOT_FINITE if value is None or not math.isfinite(value) else f"{value:.6g}"


def differences(runs: list[Run]) -> list[list[str]]:
    """Rows of (field, value in each run) for the fields that are not the same in all."""
    keys = sorted({key for run in runs for key in run.config})
    rows = [[key, *(str(run.config.get(key, ABSENT)) for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def table(title: str, runs: list[Run], rows: list[list[str]], width: int = 40) -> str:
    """The lines of a table in aligned columns: a name, then a value for each run."""
    header = [title, *(run.name for run in runs)]
    return format_table([header, *rows], "l", rule=True, max_width=width)


def plot(runs: list[Run], out: Path) -> None:
    """Plots losses over steps, smoothed, and validation losses as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        steps, losses = run.curve("loss")
        axes.plot(steps, losses, color=color, alpha=0.25, lw=1)
        axes.plot(steps, smooth(losses, len(steps) // 20 | 1), color=color, lw=2, label=run.name)
        steps, losses = run.curve("validation.loss")
        if steps:
            axes.plot(steps, losses, "o--", color=color, label=f"{run.name}, validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per label")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)


def compare(folders: list[Path], out: Path) -> str:
    """The tables of runs; also writes the plot to `out`."""
    runs = [Run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:  # of different folders
            run.name = str(run.folder)
    plot(runs, out)
    last = [[key, *(run.last(key) for run in runs)] for key in LAST]
    finite = ([v for v in run.curve("loss")[1] if math.isfinite(v)] for run in runs)
    last.insert(2, ["lowest loss", *(_format(min(values, default=None)) for values in finite)])
    parts = [table("differs", runs, differences(runs)), table("last value", runs, last)]
    return "\n\n".join([*parts, f"plot: {out}"])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = CommandParser("python -m tools.runs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="plots runs over each other, prints differences")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--out", type=Path, default=Path("compare.png"), help="plot to write")
    options = parser.parse_args(arguments)
    try:
        print(compare(options.runs, options.out))
    except ValueError as error:
        return report_error(parser.prog, error, WRONG_USAGE)
    except OSError as error:
        return report_error(parser.prog, describe(error), WRONG_USAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
