"""Checks whether inference has become slower since a commit: runs `inference.bench` of both, in
turns.

    python -m tools.bench.versus HEAD~3
    python -m tools.bench.versus v1.2 --bench "offline --model small --random-weights --clock cpu"

The commit is checked out beside this one, in a temporary worktree. In each round both run the same
benchmark, one after the other, the first one last in the next round, so that what else the machine
does falls on both alike. Of each figure the median of both, and of the rounds' ratios median and
range: above 1 it has become worse. Exit code 1: one is worse by more than --allowed in the median,
and worse in every round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.commands import DONE, FAILED, CommandParser, finite_number, report_error
from data_pipeline.commands import whole_number as whole
from data_pipeline.tables import format_table

PROGRAM = "python -m tools.bench.versus"
REPO = Path(__file__).resolve().parents[2]
BENCH = (
    "stream --model mid --random-weights --frames 32 --new-tokens 16 --threads 1 --clock cpu "
    "--device cpu"
)


class BenchFailed(RuntimeError):
    """A benchmark or git has failed; the message has its last lines."""


@dataclass
class Figure:
    """A row of the benchmark's table, with its value in each round."""

    name: str
    unit: str
    more_is_better: bool
    before: list[float] = field(default_factory=list)
    now: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """By how many times it is worse now, in each round."""
        pairs = [self.now, self.before]
        worse, better = pairs[::-1] if self.more_is_better else pairs
        return [_ratio(one, other) for one, other in zip(worse, better, strict=True)]

    def is_worse(self, allowed: float) -> bool:
        """Whether it is worse in every round, and in the median by more than the share
        `allowed`."""
        return statistics.median(self.ratios) > 1 + allowed and min(self.ratios) > 1


def _ratio(one: float, other: float) -> float:
    """How many times the other one is: 1 where both are 0."""
    if one == other:
        return 1.0
    return one / other if other else math.inf


def compare(repository: Path, revision: str, bench: list[str], rounds: int) -> list[Figure]:
    """Measures the figures that both have.

    Args:
        revision: any name that git knows of what was before; now: the repository's files.
        bench: arguments of `python -m inference.bench`, the mode first.

    Raises:
        BenchFailed: there is no such revision, or a benchmark fails.
    """
    figures: dict[str, Figure] = {}
    with _checked_out(repository, revision) as before:
        for number in range(rounds):
            sides = [("before", before), ("now", repository)]
            for side, folder in sides if number % 2 == 0 else sides[::-1]:
                print(f"round {number + 1} of {rounds}: {side}", file=sys.stderr, flush=True)
                for row in _run(folder, bench):
                    name, unit = str(row["name"]), str(row["unit"])
                    made = Figure(name, unit, bool(row["more_is_better"]))
                    getattr(figures.setdefault(name, made), side).append(row["ours"])
    whole = [f for f in figures.values() if len(f.before) == len(f.now) == rounds]
    if lost := [figure.name for figure in figures.values() if figure not in whole]:
        print(f"not compared, for not all runs have them: {', '.join(lost)}", file=sys.stderr)
    return whole


@contextmanager
def _checked_out(repository: Path, revision: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "before"
        git = ["git", "-C", str(repository), "worktree"]
        _call([*git, "add", "--quiet", "--detach", str(folder), revision], repository)
        try:
            yield folder
        finally:
            _call([*git, "remove", "--force", str(folder)], repository)


def _run(folder: Path, bench: list[str]) -> list[dict[str, str | float | bool]]:
    """Runs the benchmark of the code in a folder; its rows."""
    with tempfile.TemporaryDirectory() as out:
        _call([sys.executable, "-m", "inference.bench", *bench, "--out", out], folder)
        report = json.loads((Path(out) / f"bench-{bench[0]}.json").read_text())
    return list(report["rows"])


def _call(command: list[str], folder: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(folder)}  # not another checkout, where one is installed
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise BenchFailed(f"{' '.join(command)}: {done.stderr.strip()[-800:]}")


def table(figures: list[Figure]) -> str:
    """The table: a line for each figure."""
    lines = [["", "before", "now", "worse by", "range", ""]]
    for figure in figures:
        before, now, ratio = map(statistics.median, (figure.before, figure.now, figure.ratios))
        spread = f"{min(figure.ratios):.3f}-{max(figure.ratios):.3f}"
        lines.append(
            [figure.name, f"{before:.4g}", f"{now:.4g}", f"{ratio:.3f}x", spread, figure.unit]
        )
    return format_table(lines, "lrrrrl")


def main(arguments: list[str] | None = None) -> int:
    """Compares and prints the table; returns the exit code."""
    options = parse(arguments)
    try:
        figures = compare(REPO, options.revision, options.bench, options.rounds)
    except BenchFailed as error:
        return report_error(PROGRAM, error)
    print(table(figures))
    worse = [figure.name for figure in figures if figure.is_worse(options.allowed)]
    if worse:
        return report_error(PROGRAM, f"slower than {options.revision}: {', '.join(worse)}")
    return DONE if figures else FAILED


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("revision", metavar="REVISION", help="commit, branch or tag of what was before")
    add("--bench", type=str.split, default=BENCH.split(), metavar="ARGUMENTS",
        help=f"of inference.bench, the mode first (default: {BENCH})")  # fmt: skip
    add("--rounds", type=whole(above=0), default=5, metavar="N", help="of both")
    add("--allowed", type=finite_number(least=0), default=0.03, metavar="SHARE",
        help="by which a figure may be worse")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
