"""The training job on one rank: set up, resume, loop over steps, save, report."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.batch import MicroBatch
from data_pipeline.tokens import SpecialTokens, load_tokenizer
from moss_train import hardware
from moss_train.config import Config, to_dict
from moss_train.convert.weights import fill, random_reader
from moss_train.log import log
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.deal import Bounds
from moss_train.parallel.distribute import StepBatch, read_step
from moss_train.parallel.groups import build_groups
from moss_train.parallel.replicas import differing_replicas
from moss_train.train.checkpoint import Checkpointer
from moss_train.train.data import Audit, Epochs, check_tokens, open_loader
from moss_train.train.flops import Trains, step_flops
from moss_train.train.metrics import MetricsWriter, Progress, StepMetrics
from moss_train.train.optimizer import make_trainable
from moss_train.train.report import plot_losses, summary_table
from moss_train.train.saved import find, read_streams
from moss_train.train.step import StepResult, TrainStep
from moss_train.train.trained import freeze


def run(config: Config, resume_from: Path | None) -> None:
    """Trains `config` on this rank, from `resume_from` (a complete checkpoint) if given."""
    start_process_group(config)
    # Ranks that started in different seconds may name different folders: rank 0's is everyone's.
    decided: list[Any] = [config.run.dir, resume_from]
    dist.broadcast_object_list(decided, src=0)
    config.run.dir, resume_from = decided
    Job(config, resume_from).run()
    # Not after an error: the other ranks would notice, and report that before this rank's error.
    dist.destroy_process_group()


def start_process_group(config: Config) -> None:
    """Joins the job. Works under torchrun, and without it as a job of one rank."""
    device = hardware.activate(config.hardware.device)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if "RANK" not in os.environ else "29500")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    threads = config.hardware.threads or max(1, len(os.sched_getaffinity(0)) // local)
    torch.set_num_threads(threads)
    dist.init_process_group(
        hardware.backend(device.type), timeout=timedelta(seconds=config.hardware.timeout_s)
    )
    hardware.seed_everything(config.trainer.seed)


class Job:
    """Everything that a rank holds while it trains."""

    def __init__(self, config: Config, resume_from: Path | None):
        self.config = config
        self.folder = Path(config.run.dir)
        self.first_rank = dist.get_rank() == 0
        self.groups = build_groups(config.parallel, config.trainer.seed)
        self.model = MossVideo(config.model, config.parallel, self.groups)
        if resume_from is None:
            fill(self.model, random_reader(config.model, config.trainer.seed))
        self.counts = freeze(self.model, [*config.stage.train, *config.stage.also])
        self.trainable = make_trainable(self.model, config, self.counts)
        self.checkpointer = Checkpointer(config, self.model, self.trainable)
        tokenizer = load_tokenizer(config.data.tokenizer)
        tokens = SpecialTokens.from_tokenizer(tokenizer, config.data.tokenizer)
        self.step = TrainStep(config, self.model, self.trainable, tokens.silence)
        self.done = self.samples = self.skipped = 0
        streams = self._restore(resume_from)
        self.loader = open_loader(config, self.groups, streams) if self.groups.is_leader else None
        self.batches: Iterator[MicroBatch] | None = iter(self.loader) if self.loader else None
        self.audit = Audit(self.folder, self.groups.data_rank)
        if self.first_rank:
            self.epochs = Epochs(config, self.done)
            self.audit.cut(self.folder, self.done)
        vision = config.model.vision
        self.frame_shape = (config.data.max_tiles, 3, vision.image_size, vision.image_size)
        data, parallel = config.data, config.parallel
        self.reads = data.global_batch // (data.micro_batch * self.groups.data_size)
        self.bounds = Bounds(
            data.micro_batch,
            data.max_tokens_per_batch,
            data.max_frames_per_batch,
            # What megatron's interleaved schedule asks for.
            multiple=parallel.pipeline if parallel.virtual > 1 else 1,
        )

    def _restore(self, resume_from: Path | None) -> list[bytes] | None:
        """Loads a checkpoint; returns where the data streams stood, None for a new run."""
        init_from = self.config.init_from
        if resume_from is not None:
            run = self.checkpointer.load(resume_from)
            self.done, self.samples = run["step"], run["samples"]
            self.trainable.set_step(self.done)
            log.info("resumed %s after step %d", resume_from, self.done)
            return read_streams(resume_from)
        if init_from is not None:
            source = find(Path(init_from))
            assert source is not None  # validated
            self.checkpointer.load(source, weights_only=True)
            log.info("weights from %s", source)
        return None

    def run(self) -> None:
        """Steps until `config.steps`, or until a signal asks to stop; saves at the end."""
        self._announce()
        steps = self.config.steps
        with self._sinks() as (writer, progress), _stop_signals() as asked:
            stopped = False
            while self.done < steps and not stopped:
                started = time.perf_counter()
                batch = self._read()
                waited = time.perf_counter() - started
                result = self.step(batch, waited, bool(asked))
                self.done += 1
                self.samples += self.config.data.global_batch
                self._check(result)
                self._report(result, time.perf_counter() - started, batch, writer, progress)
                stopped = result.stop > 0
                self.checkpointer.poll()
                if stopped or self.done == steps or self._is_due():
                    self._save()
            self.checkpointer.close()
        if self.loader is not None:
            self.loader.close()
        if self.first_rank:
            self._finish(stopped)

    def _is_due(self) -> bool:
        return self.done % self.config.trainer.checkpoint_every == 0

    def _read(self) -> StepBatch:
        batch = read_step(
            self.batches,
            self.reads,
            self.bounds,
            self.config.data.pad_multiple,
            self.frame_shape,
            self.groups,
            self.step.exchange.shares,
        )
        check_tokens(batch, self.config, self.done + 1)
        return batch

    def _save(self) -> None:
        self.trainable.gather_parameters()
        differing = differing_replicas(self.model)
        if differing:
            raise RuntimeError(
                f"step {self.done}: ranks that should hold the same weights differ in {differing}: "
                "go on from the last checkpoint, and report this as a bug"
            )
        streams = self.loader.state() if self.loader else None
        self.checkpointer.save(self.done, self.samples, streams)

    def _check(self, result: StepResult) -> None:
        """Ends the job on a loss that is no number, or on too many unreadable samples."""
        if result.loss != result.loss or result.loss in (float("inf"), float("-inf")):
            raise RuntimeError(
                f"step {self.done}: the loss is {result.loss}. Lower optimizer.lr, or look at the "
                "step's samples (data.audit=true writes their keys)"
            )
        self.skipped += result.skipped
        ratio = self.skipped / (self.samples + self.skipped)
        limit = self.config.data.max_bad_ratio
        if self.skipped >= 10 and ratio > limit:
            raise RuntimeError(
                f"step {self.done}: {self.skipped} of {self.samples + self.skipped} samples could "
                f"not be read ({ratio:.1%}, data.max_bad_ratio={limit:.1%}): see the warnings above"
            )

    @contextmanager
    def _sinks(self) -> Iterator[tuple[MetricsWriter | None, Progress | None]]:
        """Metrics and console, on rank 0 only."""
        if not self.first_rank:
            yield None, None
            return
        config = self.config
        with MetricsWriter(self.folder, config.logger, to_dict(config), self.done) as writer:
            progress = Progress(config.steps, config.trainer.console_every)
            try:
                yield writer, progress
            finally:
                progress.close()

    def _report(
        self,
        result: StepResult,
        seconds: float,
        batch: StepBatch,
        writer: MetricsWriter | None,
        progress: Progress | None,
    ) -> None:
        if self.config.data.audit and self.groups.is_leader:
            self.audit.write(self.done, batch.keys)
        if writer is None or progress is None:
            return
        metrics = self._metrics(result, seconds)
        writer.write(metrics)
        progress.update(metrics)

    def _metrics(self, result: StepResult, seconds: float) -> StepMetrics:
        counts, config = result.counts, self.config
        trains = Trains(**{part: count > 0 for part, count in self.counts.trained.items()})
        flops = step_flops(
            config.model, trains, counts, config.data.max_tiles, config.parallel.recompute
        )
        tokens = counts.tokens + counts.text_tokens
        return StepMetrics(
            step=self.done,
            loss=result.loss,
            lr=self.trainable.last_lr,
            grad_norm=result.grad_norm,
            samples=config.data.global_batch,
            tokens=tokens,
            frames=counts.frames,
            step_time_s=seconds,
            model_tflops_per_s_per_rank=flops.total / seconds / dist.get_world_size() / 1e12,
            memory_gb=result.memory_gb,
            data_wait_s=result.data_wait_s,
            skipped_samples=result.skipped,
            frames_per_rank_max=result.frames_per_rank_max,
            frames_per_rank_mean=result.frames_per_rank_mean,
            padding_ratio=1 - tokens / result.padded_tokens,
            epochs=self.epochs.add(result.sources),
        )

    def _announce(self) -> None:
        config, parallel = self.config, self.config.parallel
        log.info(
            "stage %s, model %s (%s), %d ranks = %d data x %d pipeline x %d tensor, %s",
            config.stage.name,
            config.model.name,
            config.model.dtype,
            dist.get_world_size(),
            self.groups.data_size,
            parallel.pipeline,
            parallel.tensor,
            hardware.device().type,
        )
        for line in self.counts.lines():
            log.info("%s", line)
        log.info(
            "%d steps of %d samples -> %s", config.steps, config.data.global_batch, self.folder
        )

    def _finish(self, stopped: bool) -> None:
        if self.done == 0 or not (self.folder / "metrics.jsonl").exists():
            return
        plot_losses(self.folder)
        table = summary_table(
            self.folder,
            {
                "config.yaml": "configuration",
                "checkpoints/step_*": "checkpoint",
                "audit.*.jsonl": "sample keys of each step",
            },
        )
        print(table, flush=True)
        if stopped:
            log.warning("stopped by a signal after step %d: start again to go on", self.done)


@contextmanager
def _stop_signals() -> Iterator[list[float]]:
    """Collects SIGTERM and SIGINT instead of dying of them.

    The same request may come twice, from a batch system and from torchrun. A second Ctrl-C of an
    impatient user (after a second or more) has its usual effect.
    """
    caught: list[float] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _frame: object) -> None:
        caught.append(time.monotonic())
        if number == signal.SIGINT and caught[-1] - caught[0] > 1:
            raise KeyboardInterrupt

    for number in before:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
