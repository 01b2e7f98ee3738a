"""Trains a toy model on the CPU, with two replicas of two tensor ranks, while processes are killed
and stopped and files damaged, by a seed. Then compares every step's loss with a run in peace, and
looks for steps that were lost, files and processes that are left. The exit code is 0 where all is
well.

Asked to stop (Ctrl-C, SIGTERM), it ends with what it has: chaos.md and chaos.json in --out.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from data_pipeline.atomic import write_atomically
from data_pipeline.commands import DONE, FAILED, CommandParser, report_error, whole_number
from data_pipeline.signal_handlers import handling
from data_pipeline.tables import format_table

if TYPE_CHECKING:
    from tools.chaos.run import Outcome, Verdict

PROGRAM = "python -m tools.chaos"
HEADER = ("fault", "times", "what happens", "s, median", "s, most", "steps lost")


def main(arguments: list[str] | None = None) -> int:
    """Runs it, and prints a table of the kinds of faults."""
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--faults", type=whole_number(above=0), default=5, metavar="N", help="how many")
    add("--seed", type=int, default=1, metavar="N", help="of kinds, places and times")
    add("--kinds", nargs="+", default=[], metavar="NAME", help="some of them (default: all)")
    folder = Path(time.strftime("runs/chaos/%Y%m%d-%H%M%S"))
    add("--out", type=Path, metavar="FOLDER", default=folder,
        help="a new folder for both runs and the tables (default: runs/chaos/TIME)")  # fmt: skip
    args = parser.parse_args(arguments)
    if sys.platform != "linux":
        return report_error(PROGRAM, "needs Linux: it reads /proc")
    from tools.chaos.faults import all_faults
    from tools.chaos.run import Chaos

    kinds = [fault.name for fault in all_faults(Path("world"), small_disk=True)]
    if unknown := [name for name in args.kinds if name not in kinds]:
        parser.error(f"--kinds {unknown[0]}: is none of: {'; '.join(kinds)}")
    args.out.mkdir(parents=True)
    out = args.out.absolute()
    signals: list[int] = []

    def note(number: int, _frame: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt

    with handling((signal.SIGINT, signal.SIGTERM), note):
        verdict = Chaos(
            out, args.kinds, args.faults, args.seed, log=partial(print, flush=True),
            report=partial(_write, out), should_stop=lambda: bool(signals),
        )()  # fmt: skip
    print(format_table(_rows(verdict), "lrlr"))
    print(_summary(verdict))
    for line in verdict.wrong:
        report_error(PROGRAM, line)
    return FAILED if verdict.wrong else DONE


def _write(out: Path, verdict: Verdict) -> None:
    """Writes chaos.json and chaos.md: the outcomes of the faults so far."""
    write_atomically(out / "chaos.json", json.dumps(asdict(verdict), indent=1))
    header, *rows = ["| " + " | ".join(row) + " |" for row in _rows(verdict)]
    lines = [_summary(verdict), "", header, "|---" * len(HEADER) + "|", *rows]
    lines += ["", *(f"wrong: {line}" for line in verdict.wrong)] if verdict.wrong else []
    write_atomically(out / "chaos.md", "\n".join(lines) + "\n")


def _rows(verdict: Verdict) -> list[tuple[str, ...]]:
    names = sorted({outcome.name for outcome in verdict.outcomes})
    own = {name: [o for o in verdict.outcomes if o.name == name] for name in names}
    return [HEADER, *(_row(name, outcomes) for name, outcomes in own.items())]


def _row(name: str, own: list[Outcome]) -> tuple[str, ...]:
    stalls = [outcome.stall_s for outcome in own]
    happened = sorted({outcome.happened for outcome in own})
    lost = sorted({outcome.lost for outcome in own})
    return (
        name, str(len(own)), " or ".join(happened), f"{median(stalls):.1f}", f"{max(stalls):.1f}",
        f"{lost[0]} to {lost[-1]}" if len(lost) > 1 else str(lost[0]),
    )  # fmt: skip


def _summary(verdict: Verdict) -> str:
    compared = "losses not compared yet"
    if verdict.apart == verdict.apart:
        compared = f"losses differ by at most {verdict.apart:.1e} in {verdict.steps} steps"
    lines = [
        f"{len(verdict.outcomes)} of {verdict.planned} faults (seed {verdict.seed}), "
        f"{verdict.seconds / 60:.1f} minutes, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[2]:.0f}, a start {verdict.start_s:.0f} s; {compared}; "
        f"{len(verdict.wrong)} things are wrong",
        *(f"not tried: {kind}" for kind in verdict.skipped),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
