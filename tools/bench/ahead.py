"""Measures what reading a step ahead is worth: a step that reads, then computes, beside one that
does both at once.

Steps of the toy world on one rank. The loader reads in the training process; `--wait` adds a
storage that takes its time, and no processor. Both kinds take turns on the same job.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from data_pipeline.batch import MicroBatch
from data_pipeline.commands import CommandParser
from moss_train.compose import load_config


def slowed(batches: Iterator[MicroBatch], seconds: float) -> Iterator[MicroBatch]:
    """Yields the same batches, each delayed by so many seconds."""
    for batch in batches:
        time.sleep(seconds)
        yield batch


def turn(job: Any, steps: int, ahead: bool) -> dict[str, float]:
    """Runs steps; returns the seconds of a step, and of these the seconds that it waited for its
    batch and computed."""
    number = 1 if ahead else job.config.steps  # behind the last step nothing is read ahead
    batch, plan = job.reader.read(number)
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        job.step(batch, plan)
        read_began = time.perf_counter()
        batch, plan = job.reader.read(number)
        waited += time.perf_counter() - read_began
    seconds = time.perf_counter() - began
    if ahead:
        job.reader.read(job.config.steps)  # takes what has been read ahead
    each = {"step": seconds, "waited": waited, "computed": seconds - waited}
    return {name: value / steps for name, value in each.items()}


def main() -> int:
    parser = CommandParser("python -m tools.bench.ahead", description=__doc__)
    add = parser.add_argument
    add("--data", default="toy_world", type=os.path.abspath, help="folder of the toy world")
    add("--steps", type=int, default=4, help="steps of a turn")
    add("--rounds", type=int, default=5, help="turns of each kind")
    add("--wait", type=float, default=0.0, help="seconds that storage takes for a microbatch")
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of the job")
    args = parser.parse_args()
    from moss_train.train.loop import Job
    from moss_train.train.process import process_group

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "pt2",
            overrides=["model=toy", "data=toy", "hardware=cpu", f"data.root='{args.data}'",
                       f"run.dir='{folder}/run'", "data.workers=0", *args.set],
        )  # fmt: skip
        with process_group(config):
            job = Job(config, None)
            assert job.reader.batches is not None
            job.reader.batches = slowed(job.reader.batches, args.wait)
            turn(job, 1, ahead=False)
            turns = []
            for number in range(args.rounds):
                kinds = (False, True) if number % 2 == 0 else (True, False)
                own = {ahead: turn(job, args.steps, ahead) for ahead in kinds}
                turns.append((own[False], own[True]))
            job.reader.close()
    for name, each in zip(("in turn", "ahead"), zip(*turns, strict=True), strict=True):
        print(f"{name:8}", *(f"{key} {median(one[key] for one in each):.3f} s" for key in each[0]))
    ratios = [at_once["step"] / serial["step"] for serial, at_once in turns]
    print(f"ahead / in turn: {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
