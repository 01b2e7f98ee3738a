"""Inflicts faults drawn by a seed, one after the other; checks what each did to the job."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moss_train.train.metrics import read_metrics
from tools.chaos.faults import (
    FULL,
    Fault,
    NotSeenError,
    all_faults,
    small_disk,
    while_it_starts,
)
from tools.chaos.training import EVERY, Training, in_peace, make_world, options
from tools.differences import largest

# A job hangs that has no new step for HUNG_S and STARTS times its first start: on a busy machine
# later starts take longer.
HUNG_S, STARTS = 60.0, 3
FIRST_START_S = 300.0  # limit of the first start, for which nothing is in the page cache yet
APART = 1e-5  # largest difference of a step's loss
# Steps before the first fault, and for each fault: many more than it takes, because the job goes on
# while a busy machine does not let this process look. The job is stopped when all is done.
FIRST, EACH = 2 * EVERY + 1, 100
LEFT_S = 60.0  # limit until the last process of a job that has ended is gone
AFTER = 3  # steps until a fault is over: after a signal one or two more are done
EARLY = 0.25  # share of the `early` faults that come while the job starts


@dataclass
class Outcome:
    """What a fault did to the job."""

    name: str
    allowed: int  # steps that may be lost at once
    step: int = 0  # the last one before the fault
    stall_s: float = 0.0  # longest time without a new step
    lost: int = 0  # steps that were done again
    most_lost: int = 0  # most steps that were lost at once
    ends: list[int] = field(default_factory=list)  # exit codes of the job
    again: int = 0  # times that torchrun started the ranks again

    @property
    def happened(self) -> str:
        """The effect on the job, in words."""
        words = [f"the job ended with {code} and was started again" for code in set(self.ends)]
        if self.again:
            words.append("torchrun started the ranks again")
        return "; ".join(words) or "training went on"


@dataclass
class Verdict:
    """The results of a chaotic run so far. `wrong`: a line for each thing that must not be."""

    planned: int
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    apart: float = math.nan  # largest difference of a loss; not compared yet
    steps: int = 0
    start_s: float = math.nan
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)  # kinds of faults that cannot be tried here


def chosen(faults: Sequence[Fault], count: int, chance: random.Random) -> list[tuple[Fault, bool]]:
    """`count` faults in a random order, each kind equally often; with each, whether it comes while
    the job starts. None where there are no kinds."""
    plan: list[tuple[Fault, bool]] = []
    while faults and len(plan) < count:
        for fault in chance.sample(list(faults), len(faults)):
            plan.append((fault, fault.early and chance.random() < EARLY))
    return plan[:count]


@dataclass
class Chaos:
    """A training with faults, then the same in peace.

    Args:
        folder: of both runs; it must be empty.
        kinds: names of faults; empty: all.
        count: number of faults.
        log: called with each line of progress.
        report: called with the verdict so far, after each fault and at the end.
        should_stop: whether to stop before the next fault.
    """

    folder: Path
    kinds: Sequence[str]
    count: int
    seed: int
    log: Callable[[str], None]
    report: Callable[[Verdict], None] = lambda verdict: None
    should_stop: Callable[[], bool] = lambda: False

    def __call__(self) -> Verdict:
        """Runs both trainings; returns the verdict."""
        self.chance, self.began = random.Random(self.seed), time.monotonic()
        self.verdict = Verdict(self.count, self.seed)
        self.options = options(make_world(self.folder), FIRST + EACH * self.count)
        with small_disk(self.folder / "disk") as mounted:
            if not mounted:
                self.verdict.skipped.append(f"{FULL} (only root may mount a small one)")
            job = Training(self.folder, self.folder / "disk" / "run", self.options)
            with job.running():
                self._all_faults(job, all_faults(self.folder / "world", mounted))
                code = job.stop(HUNG_S)
                self.verdict.wrong += _wrong(job, code)
            shutil.copytree(job.run, self.folder / "run")
        self.verdict.steps = job.step
        self._compare(self._in_peace(job.step))
        self._report()
        return self.verdict

    def _report(self) -> None:
        self.verdict.seconds = time.monotonic() - self.began
        self.report(self.verdict)

    def _all_faults(self, job: Training, faults: Sequence[Fault]) -> None:
        verdict = self.verdict
        job.wait(1, FIRST_START_S)
        verdict.start_s = time.monotonic() - self.began
        limit_s = HUNG_S + STARTS * verdict.start_s
        self.log(f"a start: {verdict.start_s:.0f} s")
        selected = [fault for fault in faults if not self.kinds or fault.name in self.kinds]
        if not selected:
            verdict.wrong.append("no fault was tried: none of --kinds can be, here")
        for fault, early in chosen(selected, self.count, self.chance):
            if self.should_stop():
                break
            outcome = self._one(job, while_it_starts(fault, verdict.start_s) if early else fault)
            if self.should_stop():  # the signal to this process may have reached the job's, too
                break
            verdict.outcomes.append(outcome)
            self._report()
            done = len(verdict.outcomes)
            left_s = verdict.seconds / done * (self.count - done)
            self.log(
                f"{done}/{self.count} ({verdict.seconds / 60:.1f} min, {left_s / 60:.0f} more) "
                f"step {outcome.step}: {outcome.name}: {outcome.happened}, "
                f"{outcome.stall_s:.1f} s, {outcome.lost} lost"
            )
            if job.done or outcome.stall_s > limit_s:
                verdict.wrong.append(
                    f"{outcome.name}: no new step for {outcome.stall_s:.0f} s, see {job.log}"
                )
                break

    def _one(self, job: Training, fault: Fault) -> Outcome:
        """Inflicts one fault; its outcome."""
        limit_s = HUNG_S + STARTS * self.verdict.start_s
        job.wait(max(FIRST, job.step + self.chance.randint(0, EVERY - 1)), limit_s)
        time.sleep(self.chance.uniform(0, 0.5))
        job.poll()
        outcome = Outcome(fault.name, fault.lost * EVERY, job.step)
        before, ends = len(job.starts()), len(job.ends)
        job.fresh()
        try:
            fault.inflict(job, self.chance)
        except NotSeenError as error:
            self.verdict.wrong.append(f"{fault.name} at step {outcome.step}: {error}")
        job.wait(outcome.step + AFTER, limit_s)
        outcome.stall_s, outcome.ends = job.stall_s, job.ends[ends:]
        later = job.starts()[before:]
        outcome.lost = sum(start["lost_steps"] for start in later)
        outcome.most_lost = max((start["lost_steps"] for start in later), default=0)
        outcome.again = sum(start["restart"] > 0 for start in later)
        if outcome.most_lost > outcome.allowed:
            lost = f"{outcome.most_lost} steps lost, not {outcome.allowed}"
            self.verdict.wrong.append(f"{fault.name} at step {outcome.step}: {lost}")
        return outcome

    def _in_peace(self, steps: int) -> Path:
        """Runs as many steps without faults; returns the run folder."""
        self.log(f"{steps} steps in peace")
        overrides = [*self.options, *in_peace(steps)]
        quiet = Training(self.folder, self.folder / "quiet", overrides)
        with quiet.running():
            quiet.wait(steps, FIRST_START_S)
            quiet.stop(HUNG_S)
        return quiet.run

    def _compare(self, quiet: Path) -> None:
        """Compares the losses of both runs, step by step."""
        verdict = self.verdict
        steps = range(1, verdict.steps + 1)
        found = [row["step"] for row in read_metrics(self.folder / "run")]
        if found != list(steps):
            missing = sorted(set(steps) - set(found))
            verdict.wrong.append(f"metrics.jsonl has {len(found)} steps; not {missing}")
        expected, losses = (
            {row["step"]: _number(row["loss"]) for row in read_metrics(run)}
            for run in (quiet, self.folder / "run")
        )
        both = sorted(expected.keys() & losses.keys())
        apart = {step: abs(expected[step] - losses[step]) for step in both}
        worst = largest(apart.values())
        if both:
            verdict.apart = math.inf if math.isnan(worst) else worst  # a loss that is no number
        if not verdict.apart <= APART:
            first = next((step for step in both if not apart[step] <= APART), None)
            verdict.wrong.append(f"losses differ by {verdict.apart:.1e}, first at step {first}")
        if len(both) < verdict.steps:
            verdict.wrong.append(f"only {len(both)} of {verdict.steps} losses could be compared")


def _number(loss: float | None) -> float:
    """A loss of metrics.jsonl, where null stands for one that is not finite."""
    return math.nan if loss is None else loss


def _wrong(job: Training, code: int | None) -> Iterator[str]:
    if code != 130:
        yield f"asked to stop, the job ended with {code}: see {job.log}"
    until = time.monotonic() + LEFT_S
    while job.left() and time.monotonic() < until:
        time.sleep(0.1)
    for pid in job.left():
        yield f"process {pid} is left"
    for path in job.files_left():
        yield f"{path} is left"
