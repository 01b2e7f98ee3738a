"""Trains the demo's real-time stage once with each loss, and prints what the models say and when.

All start from the shipped weights and read the same samples in the same order. What is finished
already in OUT is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.cgroups import cores
from data_pipeline.commands import FAILED, CommandParser, finite_number, report_error, whole_number
from data_pipeline.tables import format_table
from tools.demo.__main__ import run_all
from tools.demo.parts import LIVE, LOSSES, RECORD, compared

METRICS = {
    "decision F1": "decision F1",
    "in time": "events spoken within 1 s",
    "right": "with the right words",
    "answers": "answers mid-stream",
    "false/min": "false alarms a minute",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the trainings and evaluations, and prints the table."""
    parser = CommandParser("python -m tools.demo.losses", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/losses"), metavar="FOLDER", help="where all goes")
    add("--train", type=whole_number(above=0), metavar="N",
        help="training samples of each source (default: 1500)")  # fmt: skip
    add("--heldout", type=whole_number(above=0), metavar="N",
        help="held-out samples of each source (default: 60)")  # fmt: skip
    add("--ranks", type=whole_number(above=0), default=min(2, cores()), metavar="N",
        help="processes that train")  # fmt: skip
    add("--scale", type=finite_number(above=0), default=1.0, metavar="X",
        help="factor of the 500 steps of each training")  # fmt: skip
    add("overrides", nargs="*", metavar="FIELD=VALUE", help="field of all trainings")
    options: argparse.Namespace = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        run_all(compared(options), options.out / RECORD)
    except subprocess.CalledProcessError as error:
        failed = f"{' '.join(map(str, error.cmd))} ended with exit code {error.returncode}"
        return report_error(parser.prog, failed, error.returncode or FAILED)
    print(format_table(list(rows(options.out)), "l", rule=True))
    return 0


def rows(out: Path) -> Iterator[list[str]]:
    """The rows of the table: a header, and one for each loss."""
    yield ["loss", *METRICS, "s to first word"]
    for name in LOSSES:
        found = json.loads((out / name / "evaluation.json").read_text())
        scores = {
            s["metric"].strip(): s["value"]
            for s in found["scores"]
            if s["source"] == f"{LIVE}/video"
        }
        late = lateness(found["timelines"])
        numbers = [f"{scores[metric]:.3f}" for metric in METRICS.values()]
        yield [name, *numbers, f"{sum(late) / len(late):.2f}" if late else ""]


def lateness(timelines: Sequence[Mapping[str, Any]]) -> list[int]:
    """Seconds from each event's frame to the first sentence that begins from then on and before the
    next event; an event without one is left out."""
    found = []
    for timeline in timelines:
        events = [second for second, _ in timeline["wanted"]]
        for second, end in pairwise([*events, timeline["seconds"]]):
            delays = [begin - second for begin, _ in timeline["spoken"] if second <= begin < end]
            found += delays[:1]
    return found


if __name__ == "__main__":
    sys.exit(main())
