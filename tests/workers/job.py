"""Runs training jobs one after another, in one start: job.py '[{"name": ..., "overrides": [...]}]'.

Each does what launch/train.py does, but the process group is started once. Rank 0 saves what a
job came to under its name: its error (None: it ended well), its final weights under their HF
names, and the steps that its optimizer has counted.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from moss_train.compose import load_config
from moss_train.config import Config
from moss_train.log import configure
from moss_train.main import check
from tests.moss_train.train.runs import flip_a_bit
from tests.torchrun import save_result
from tests.workers.groups import end_groups


@dataclass
class Task:
    """stop_after: this step is the last one, for rank 0 sends itself a SIGTERM in it.

    file_limit: (step, bytes): from this step on no file can grow beyond `bytes`, as on a full disk;
        (step, bytes, last): up to that one.
    poison: for each batch (the first is 1) what is wrong with it, on the last rank alone: "loss"
        (no number), "gradient" (infinite), "weights" (others than on other ranks) or "file" (a bit
        of the newest checkpoint flips).
    page: the run's report is written at the end, which takes as long as three steps.
    """

    name: str
    overrides: list[str]
    stop_after: int | None = None
    file_limit: tuple[int, ...] | None = None
    poison: dict[str, str] = field(default_factory=dict)
    page: bool = False
    seen: dict[str, Any] = field(default_factory=dict)


def main(tasks: list[Task]) -> None:
    configure()
    for number, task in enumerate(tasks):
        config = load_config(overrides=task.overrides)
        if number == 0:
            from moss_train.train.process import start_process_group

            start_process_group(config)
        print(f"--- {task.name}", file=sys.stderr)
        run(task, config)
    dist.barrier()
    dist.destroy_process_group()


def run(task: Task, config: Config) -> None:
    """One job; an error that all ranks meet ends it, not the process."""
    from moss_train import hardware

    hardware.seed_everything(config.trainer.seed)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    error = None
    try:
        run_checked(task, config)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    if dist.get_rank() == 0:
        save_result(task.name, {"error": error, **task.seen})
    end_groups()
    gc.collect()


def run_checked(task: Task, config: Config) -> None:
    from moss_train.evaluate.in_training import Suites
    from moss_train.parallel.distribute import StepBatch
    from moss_train.train import loop
    from moss_train.train.loop import Job
    from moss_train.train.start import steps_left
    from moss_train.train.step import StepResult
    from moss_train.train.step_plan import StepPlan

    class Watched(Job):
        """A job that things happen to."""

        batch = 0

        def _read(self) -> tuple[StepBatch, StepPlan]:
            self.batch += 1
            return super()._read()

        def _count_bad_samples(self, result: StepResult) -> None:
            super()._count_bad_samples(result)
            last = dist.get_rank() == dist.get_world_size() - 1
            how = task.poison.get(str(self.batch)) if last else None
            if how == "weights":
                with torch.no_grad():
                    self.model.encoder.projector.linear.weight[0, 0] += 1e-3
            if how == "file":
                newest = max(self.folder.glob("checkpoints/step_*"))
                flip_a_bit(max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size))
            first = dist.get_rank() == 0
            if task.stop_after is not None and self.done == task.stop_after - 1 and first:
                os.kill(os.getpid(), signal.SIGTERM)
            begin, size, end = (*(task.file_limit or ()), -1, -1, -1)[:3]
            if self.done in (begin, end):
                self.checkpointer.finish()  # what is being written fits
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                soft = size if self.done == begin else hard
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    resume_from = check(config)
    steps_left(config, resume_from)  # says what has changed
    job = Watched(config, resume_from, suites=Suites)
    if task.poison and dist.get_rank() == dist.get_world_size() - 1:
        poison(job, task.poison)
    written = loop.write_report_or_warn if task.page else lambda run_dir, config: None
    try:
        with mock.patch.object(loop, "write_report_or_warn", written):
            job.run()
    except BaseException:
        # Else the garbage collection ends the loader's workers, after it has ended the queues that
        # would tell them to: it waits five seconds for each.
        job.reader.close()
        raise
    task.seen["weights"] = whole_weights(job.model)
    task.seen["deterministic"] = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    task.seen["fills_memory"] = settings.fill_uninitialized_memory
    task.seen["adam_steps"] = [g["step"] for g in job.state.optimizer.param_groups]


def poison(job: Any, batches: dict[str, str]) -> None:
    """Spoils the loss (of the last rank, which has the last stage) or the projector's gradient."""

    def ills() -> str | None:
        return batches.get(str(job.batch))

    def spoil(module: torch.nn.Module, inputs: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss * (math.nan if ills() == "loss" else 1.0)

    def blow_up(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (math.inf if ills() == "gradient" else 1.0)

    job.model.chunks[-1].register_forward_hook(spoil)
    job.model.encoder.projector.linear.weight.register_hook(blow_up)


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """All ranks' weights in one dict (the stages of a pipeline have different ones)."""
    from moss_train.convert.weights import export

    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {name: w.clone() for name, w in export(model).items()})
    return {name: tensor for part in everywhere for name, tensor in part.items()}


if __name__ == "__main__":
    main([Task(**task) for task in json.loads(Path(sys.argv[1]).read_text())])
