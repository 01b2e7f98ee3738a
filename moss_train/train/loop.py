"""The training job on one rank: set up, resume, loop over steps, save, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from data_pipeline.tokenizer_identity import identify
from data_pipeline.tokens import SpecialTokens, load_tokenizer
from moss_train import hardware
from moss_train.checkpoint_dir import find
from moss_train.config import Config
from moss_train.convert.llama import initial_reader
from moss_train.convert.weights import fill
from moss_train.log import log
from moss_train.model.choose_attention import choose_attention
from moss_train.model.choose_kernels import choose_kernels
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.distribute import StepBatch
from moss_train.parallel.process_groups import build_groups
from moss_train.parallel.replicas import check_replicas
from moss_train.run_lock import running_in
from moss_train.sources import shared_sources, unread_sources
from moss_train.storage import StorageError, or_warning
from moss_train.train.checkpoint import Checkpointer
from moss_train.train.data import Audit, BadSamples, Epochs, StepReader
from moss_train.train.description import write_description
from moss_train.train.flops import TrainedParts, step_flops
from moss_train.train.goodput import OutsideSteps
from moss_train.train.guard import BAD_STEPS_FILE, Guard, write_bad_step
from moss_train.train.heartbeat import beat
from moss_train.train.held_out import HeldOut, Measured, OpenSuites
from moss_train.train.history import FoundRun, all_hosts, note, note_start, noting_errors
from moss_train.train.loggers import close_loggers, open_loggers
from moss_train.train.metrics import Logger, MetricsWriter, StepLine, StepMetrics, read_metrics
from moss_train.train.optimizer import make_train_state, schedule_warnings
from moss_train.train.param_groups import check_gradients, freeze
from moss_train.train.process import process_group, start_writer_queue, stop_signals
from moss_train.train.profiler import StepProfiler
from moss_train.train.report import write_report_or_warn
from moss_train.train.start import agree_on_start, last_whole, steps_left
from moss_train.train.step import StepResult, TrainStep
from moss_train.train.step_plan import StepPlan
from moss_train.train.stragglers import Stragglers
from moss_train.train.summary import print_summary
from moss_train.train.unlearned import UnlearnedWarnings
from moss_train.train.watchdog import share_run_folder, watched


def run(
    config: Config,
    resume_from: Path | None,
    console: TextIO | None = None,
    suites: OpenSuites | None = None,
) -> bool:
    """Trains `config` on this rank, from `resume_from` (a complete checkpoint) if given.

    Args:
        console: for the lines of the steps and the table at the end (default: stdout).
        suites: what asks `trainer.eval_suites`.

    Returns:
        True where a signal stopped the run before its last step.
    """
    start_writer_queue()
    with (
        watched(config),
        open_loggers(config, resume_from) as loggers,
        process_group(config),
        stop_signals(),
    ):
        resume_from, damaged = agree_on_start(config, resume_from)
        left, changed = steps_left(config, resume_from)
        if not left:
            return False
        share_run_folder(Path(config.run.dir))
        found = FoundRun(resume_from, damaged, changed)
        job = Job(config, resume_from, console, loggers, found, suites)
        try:
            stopped = job.run()
        except BaseException:
            if dist.get_world_size() == 1:  # else the process ends, and its workers with it
                job.reader.close()
            raise
        close_loggers(loggers, failed=False)
        # All end together: rank 0 still had to write the report, and to upload its last steps. Of a
        # job that is stopped srun kills the machines that end seconds after the first.
        dist.barrier()
        return stopped


class Job:
    """Everything that a rank holds while it trains."""

    def __init__(
        self,
        config: Config,
        resume_from: Path | None,
        console: TextIO | None = None,
        loggers: Sequence[Logger] = (),
        found: FoundRun | None = None,
        suites: OpenSuites | None = None,
    ):
        self.found = found or FoundRun(resume_from)
        self.config, self.console, self.loggers = config, console, loggers
        self.folder, self.first_rank = Path(config.run.dir), dist.get_rank() == 0
        self.groups = build_groups(config.parallel, config.trainer.seed, config.hardware.timeout_s)
        model = choose_attention(config.model, config.parallel, self.groups)
        config = replace(config, model=model)  # self.config keeps what was asked for
        kernels = choose_kernels(config.model)
        self.model = MossVideo(config.model, config.parallel, self.groups, config.adapter, kernels)
        if resume_from is None:
            # What a checkpoint holds is not drawn first: of 11B that takes minutes.
            initial = initial_reader(config.model, config.trainer.seed)
            fill(self.model, initial, adapters_only=config.init_from is not None)
        self.counts = freeze(self.model, config.stage.train, config.stage.also)
        self.state = make_train_state(self.model, config, self.counts)
        path = config.data.tokenizer
        self.checkpointer = Checkpointer(self.config, self.model, self.state, identify(path))
        tokens = SpecialTokens.from_tokenizer(load_tokenizer(path), path)
        self.done = self.samples = 0
        self.bad_samples = BadSamples(config.data.max_bad_ratio)
        order = self._restore(resume_from)
        check_gradients(self.model, self.counts, config.stage)
        self.guard = Guard.resume(config.trainer.spike_factor, self.folder, self.done)
        self.step = TrainStep(config, self.model, self.state, tokens.silence, self.guard)
        step = self.step
        self.reader = StepReader(config, self.groups, step.exchange.shares, step.loss, order)
        self.held_out = HeldOut(config, step, self.reader, suites)
        # What its GPU can compute, which fp32 is no measure of.
        self.peak = hardware.peak_tflops() if config.model.dtype == "bf16" else None
        profiled = config.trainer.profiled_steps if self.first_rank else None
        self.profiler = StepProfiler(profiled, self.folder / "profile")
        self.save_due = False  # a checkpoint should have been saved, but the last step was left out
        self.outside, self.stragglers = OutsideSteps(), Stragglers(config.trainer.slow_ranks_every)
        self.audit = Audit(self.folder, self.groups.data_rank)
        if (read := self.reader.state()) is not None:
            self.epochs = Epochs(read)

    def _restore(self, resume_from: Path | None) -> dict[str, Any] | None:
        """Loads a checkpoint; returns where the run stood in its data, None for a new order."""
        if resume_from is not None:
            order = self._load(resume_from)
            log.info("resumed %s after step %d", resume_from, self.done)
            return order
        if self.config.init_from is not None:
            source = find(Path(self.config.init_from))
            assert source is not None  # validated
            self.checkpointer.load_weights(source)
            log.info("weights from %s", source)
        return None

    def _load(self, checkpoint: Path) -> dict[str, Any] | None:
        beat("load")
        run = self.checkpointer.load(checkpoint)
        self.done, self.samples = run["step"], run["samples"]
        self.state.set_step(self.done)
        return run.get("data_order")

    def run(self) -> bool:
        """Steps until `config.steps` or a signal asks to stop (then True); saves at the end."""
        self._announce()
        steps = self.config.steps
        with ExitStack() as opened, stop_signals() as stop_requests:
            opened.callback(self.reader.stop)
            stopped, sinks = False, None
            while self.done < steps and not stopped:
                beat("data", self.done + 1)
                started = time.perf_counter()
                with self.profiler.step(self.done + 1):
                    batch, plan = self._read()
                    waited = time.perf_counter() - started
                    result = self.step(batch, plan, waited, bool(stop_requests))
                seconds = time.perf_counter() - started
                if sinks is None:
                    sinks = opened.enter_context(self._records())
                writer, progress = sinks
                self.done += 1
                self.samples += self.config.data.global_batch
                self._count_bad_samples(result)
                self.outside.time = time.time()
                measured = self.held_out(self.done, result, stop_requests)
                self.outside.validation_s = measured.seconds
                self._report(result, seconds, measured, batch, writer, progress)
                slow = self.stragglers.add(result.phase_s | {"data": waited})
                for line in slow if self.first_rank else ():
                    log.warning("step %d: slow: %s", self.done, line)
                self.save_due |= self.done % self.config.trainer.checkpoint_every == 0
                returned = result.refused is not None and self._skip(result, batch, writer)
                every = self.config.trainer.compare_replicas_every
                if every is not None and self.done % every == 0:
                    self._compare()
                stopped = result.stop > 0
                with self.outside.saving():
                    self.checkpointer.poll()
                # Weights that steps fail with are not worth a checkpoint; those loaded have theirs.
                last = stopped or self.done == steps
                if not returned and (last or (self.save_due and not self.guard.in_a_row)):
                    with self.outside.saving():
                        self._save(last)
            beat("save")
            self.checkpointer.close()
        self.reader.close()
        if self.first_rank and sinks is not None:
            self._finish(stopped)
        return stopped

    def _read(self) -> tuple[StepBatch, StepPlan]:
        return self.reader.read(self.done + 1)

    def _skip(self, result: StepResult, batch: StepBatch, writer: MetricsWriter | None) -> bool:
        """Writes a left-out step down; after several in a row, goes back to a checkpoint (then
        True)."""
        assert result.refused is not None
        log.warning("step %d left out: %s (%g)", self.done, result.refused, result.loss)
        write_bad_step(
            self.folder, self.done, result.refused, result.loss, result.grad_norm, batch.keys
        )
        in_a_row, limit = self.guard.in_a_row, self.config.trainer.max_skipped_steps
        if in_a_row < limit:
            return False
        self.checkpointer.finish()
        source = last_whole(self.folder)
        if source is None or not self.guard.may_help(source):
            why = "there is no checkpoint" if source is None else f"{source} did not help"
            raise RuntimeError(
                f"step {self.done}: {in_a_row} steps in a row were left out, the last since "
                f"{result.refused}, and {why}: lower optimizer.lr, or look at the samples that "
                f"{self.folder / BAD_STEPS_FILE} names"
            )
        self._load(source)
        self.guard.returned(source)
        self.save_due = False
        log.warning("back to %s after %d steps left out; on with other data", source, in_a_row)
        if writer is not None:
            writer.rewind(self.done)
            self.audit.cut(self.folder, self.done)
        return True

    def _compare(self) -> None:
        self.state.gather_parameters()
        check_replicas(self.model, self.done)

    def _save(self, last: bool) -> None:
        beat("save")
        self._compare()
        self.checkpointer.save(self.done, self.samples, self.reader.state(), last)
        self.save_due = False

    def _count_bad_samples(self, result: StepResult) -> None:
        """Raises RuntimeError where too many samples were unusable."""
        self.bad_samples.add(self.done, self.config.data.global_batch, result.skipped)

    @contextmanager
    def _records(self) -> Iterator[tuple[MetricsWriter | None, StepLine | None]]:
        """Opens the run folder, after the first step that this process has done: a job that fails
        before leaves the folder as it was. Metrics and console on rank 0 only. A collective.
        """
        config = self.config
        hosts = all_hosts()
        if not self.first_rank:
            dist.barrier()
            yield None, None
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a quota; what looks like a folder that can be written
            raise StorageError(f"run.dir={self.folder}: cannot be made: {error.strerror}") from None
        with running_in(self.folder), noting_errors(self.folder):
            self.checkpointer.open_folder(self.found.damaged)
            layout = {"world": dist.get_world_size(), "data": self.groups.data_size}
            layout |= {"pipeline": config.parallel.pipeline, "tensor": config.parallel.tensor}
            kind = hardware.device().type
            with or_warning("run.json and config.yaml"):
                write_description(self.folder, config, layout, asdict(self.counts), kind)
            note_start(self.folder, self.found, self.done, hosts, layout)
            self.audit.cut(self.folder, self.done)
            dist.barrier()  # from now on other replicas write to their audits
            with self._sinks() as sinks:
                yield sinks

    @contextmanager
    def _sinks(self) -> Iterator[tuple[MetricsWriter, StepLine]]:
        """Metrics and console, on rank 0."""
        config = self.config
        writer = MetricsWriter(self.folder, self.loggers, self.done)
        self.unlearned = UnlearnedWarnings(read_metrics(self.folder), config.steps)
        progress = StepLine(config.steps, config.trainer.console_every, self.console)
        try:
            yield writer, progress
        finally:
            progress.close()

    def _report(
        self,
        result: StepResult,
        seconds: float,
        measured: Measured,
        batch: StepBatch,
        writer: MetricsWriter | None,
        progress: StepLine | None,
    ) -> None:
        if self.config.data.audit and self.groups.is_leader:
            self.audit.write(self.done, batch.keys)
        if writer is None or progress is None:
            return
        metrics = self._metrics(result, seconds, measured)
        writer.write(metrics)
        progress.update(metrics)
        self.unlearned.add(asdict(metrics))

    def _metrics(self, result: StepResult, seconds: float, measured: Measured) -> StepMetrics:
        counts, config, trained = result.counts, self.config, self.counts.trained
        # Adapters are small: neither they nor what runs through frozen weights to them is counted.
        decoder = trained["decoder"] > 0 and not self.model.adapted
        trains = TrainedParts(trained["vision"] > 0, trained["projector"] > 0, decoder)
        flops = step_flops(
            config.model, trains, counts, config.data.max_tiles, config.parallel.recompute,
            result.kept_frames,
        )  # fmt: skip
        tokens = counts.tokens + counts.text_tokens
        rank_seconds = seconds * dist.get_world_size()
        of_peak = None if self.peak is None else 1 / (rank_seconds * self.peak * 1e12)
        return StepMetrics(
            step=self.done,
            loss=result.loss,
            weighted_loss=result.weighted_loss,
            lr=self.state.last_lr,
            grad_norm=result.grad_norm,
            samples=config.data.global_batch,
            tokens=tokens,
            labels=counts.labels + counts.text_labels,
            frames=counts.frames,
            step_time_s=seconds,
            model_tflops_per_s_per_rank=flops.total / rank_seconds / 1e12,
            mfu=of_peak and flops.total * of_peak,
            hfu=of_peak and (flops.total + flops.recomputed) * of_peak,
            phase_s=result.phase_s,
            memory_gb=result.memory_gb,
            data_wait_s=min(result.data_wait_s, seconds),
            skipped_samples=sum(result.skipped.values()),
            skipped_reasons=result.skipped,
            **asdict(result.unlearned),
            skipped_steps=self.guard.skipped,
            frames_per_rank_max=result.frames_per_rank_max,
            frames_per_rank_mean=result.frames_per_rank_mean,
            padding_ratio=1 - tokens / result.padded_tokens,
            epochs=self.epochs.add(result.sources),
            validation=measured.validation,
            suites=measured.suites,
            **self.outside.take(),
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
        unread = unread_sources(config)
        if unread:
            log.info("not read, as stage.mixture gives them no share: %s", ", ".join(unread))
        for line in (*schedule_warnings(config), *shared_sources(config)):
            log.warning("%s", line)
        log.info(
            "%d steps of %d samples -> %s", config.steps, config.data.global_batch, self.folder
        )

    def _finish(self, stopped: bool) -> None:
        note(self.folder, "stopped" if stopped else "end", step=self.done)
        write_report_or_warn(self.folder, self.config)
        print_summary(self.folder, self.console)
        if stopped:
            log.warning("stopped by a signal after step %d: start again to go on", self.done)
