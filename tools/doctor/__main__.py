"""Prints what this machine has, how fast it is, what is wrong with it and how to mend that:

    python -m tools.doctor

Packages, devices, which attention and kernels run and why, memory, videos; a matrix product, copies
and an all-reduce over local ranks. The exit code is 0 where nothing is wrong, 1 else.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from data_pipeline.commands import DONE, FAILED, CommandParser
from data_pipeline.tables import format_table

if TYPE_CHECKING:
    from tools.doctor.checks import Findings

PROGRAM = "python -m tools.doctor"


def main(arguments: list[str] | None = None) -> int:
    """Prints the page."""
    parser = CommandParser(PROGRAM, description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="measure nothing")
    add("--json", action="store_true", help="print JSON instead of a page")
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        found = _findings(args.quick)
    except ImportError as error:  # of what everything needs
        print(f"wrong: {error}\n  mend: pip install -e .", file=sys.stderr)
        return FAILED
    if args.json:
        print(json.dumps(asdict(found)))
    else:
        print(format_table([("what", "here"), *found.rows], "l", rule=True))
        for wrong, mend in found.faults:
            print(f"\nwrong: {wrong}\n  mend: {mend}")
        seconds = time.perf_counter() - started
        print(f"\n{len(found.faults)} faults, {seconds:.0f} s")
    return FAILED if found.faults else DONE


def _findings(quick: bool) -> Findings:
    from tools.doctor import checks

    found = checks.Findings()
    work = [checks.packages, checks.machine, checks.attention, checks.media]
    if not quick:
        from tools.doctor import speed

        work += [speed.computing, speed.sums]
    for part in work:
        try:
            part(found)
        except Exception as error:  # whatever a broken machine raises: the others are told, too
            found.fault(f"{part.__name__}: {type(error).__name__}: {error}", "see the line above")
    return found


if __name__ == "__main__":
    sys.exit(main())
