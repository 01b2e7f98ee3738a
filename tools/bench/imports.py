"""Measures the time that importing this project's packages takes.

Each import runs in processes of its own; the table has the median and the fastest of them in
seconds, how many modules it loads, and which heavy ones. A limit is what the project promises for
`import moss_train` and `import inference`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from statistics import median

from data_pipeline.commands import DONE, FAILED, CommandParser
from data_pipeline.tables import format_table

PROGRAM = "python -m tools.bench.imports"
STATEMENTS = {  # -> limit in seconds
    "import moss_train": 0.3,
    "import inference": 0.3,
    "from moss_train import load_config": None,
    "from moss_train.api import train": None,
    "from inference import load": None,
}
HEAVY = ("torch", "megatron.core", "transformers", "hydra", "matplotlib", "av")
CODE = """
import json, sys, time
before, began = len(sys.modules), time.perf_counter()
{statement}
seconds = time.perf_counter() - began
heavy = [name for name in {heavy} if name in sys.modules]
print(json.dumps([seconds, len(sys.modules) - before, heavy]))
"""


@dataclass(frozen=True)
class Import:
    """Costs of one import statement, in seconds."""

    statement: str
    times: list[float]
    modules: int
    heavy: list[str]


def measure(statement: str, runs: int) -> Import:
    """Runs a statement in `runs` new processes."""
    code = CODE.format(statement=statement, heavy=HEAVY)
    times, modules, heavy = [], 0, []
    for _ in range(runs):
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, modules, heavy = json.loads(done.stdout.splitlines()[-1])
        times.append(seconds)
    return Import(statement, times, modules, heavy)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 where a median is above its limit."""
    parser = CommandParser(PROGRAM, description=__doc__)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="processes per import")
    options: argparse.Namespace = parser.parse_args(arguments)
    rows, slow = [["statement", "median", "fastest", "limit", "modules", "heavy"]], False
    for statement, limit in STATEMENTS.items():
        found = measure(statement, options.runs)
        middle = median(found.times)
        slow |= limit is not None and middle > limit
        bound = "" if limit is None else f"{limit:.1f}"
        times = [f"{middle:.3f}", f"{min(found.times):.3f}"]
        rows.append([statement, *times, bound, str(found.modules), ", ".join(found.heavy)])
    print(format_table(rows, "lrrrrl"))
    return FAILED if slow else DONE


if __name__ == "__main__":
    sys.exit(main())
