"""The data loader of a replica, where a checkpoint left it, and the record of what it gave."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from data_pipeline.batch import MicroBatch
from data_pipeline.encode import EncodeConfig
from data_pipeline.loader.loader import Loader, build_loader
from data_pipeline.loader.order import Part
from data_pipeline.loader.state import OrderState
from moss_train.config import Config
from moss_train.model.groups import Groups
from moss_train.model.loss import LossOptions
from moss_train.parallel.distribute import (
    HostStep,
    StepBatch,
    assemble,
    distribute,
    end_reading,
    read_step,
)
from moss_train.parallel.packing import Bounds
from moss_train.sources import mixed_sources
from moss_train.train import json_lines
from moss_train.train.background import BackgroundWork
from moss_train.train.step_plan import StepPlan
from moss_train.train.unlearned import reasons


def open_loader(config: Config, groups: Groups, order: dict[str, Any] | None) -> Loader:
    """Opens this replica's loader (on its leader).

    Args:
        order: where a run that goes on stood, from its run.json; what has changed since begins
            anew (moss_train/resume.py has asked whether it may). None for a new run.
    """
    data = config.data
    return build_loader(
        mixed_sources(config),
        encode_config(config),
        Part(
            data.global_batch,
            data.read_together(groups.data_size),
            groups.data_rank,
            groups.data_size,
        ),
        workers=data.workers,
        seed=config.trainer.seed,
        shuffle_window=data.shuffle_window,
        state=order,
        stores=data.stores,
    )


@dataclass
class PreparedStep:
    """A step that has been read."""

    step: HostStep
    plan: StepPlan


class StopReading(Exception):
    """The reader has been stopped in the middle of a step."""


class StepReader:
    """Reads the steps of this replica, and distributes each to its ranks.

    While a step is computed, a thread of each rank prepares the next one up to what it asks of the
    device: the leader's reads samples, packs them and gathers their frames; text goes to the other
    ranks over `groups.host`, which nothing else uses then (`settle`); each plans its step.
    """

    LONGEST_STOP_S = 10.0

    def __init__(
        self,
        config: Config,
        groups: Groups,
        shares: int,
        loss: LossOptions,
        order: dict[str, Any] | None,
    ):
        """`shares`: as in `read_step`; `loss`: of training; `order`: as in `open_loader`."""
        data, vision = config.data, config.model.vision
        self.loss = loss
        self._ahead: BackgroundWork[PreparedStep] | None = None
        self._stopping = False
        self.config, self.groups, self.shares = config, groups, shares
        self.loader = open_loader(config, groups, order) if groups.is_leader else None
        self.batches: Iterator[MicroBatch] | None = iter(self.loader) if self.loader else None
        self.frame_shape = (data.max_tiles, 3, vision.image_size, vision.image_size)
        self.steps = 0  # that `read` has given
        self.samples = data.global_batch // groups.data_size  # of a step of this replica
        self.reads = self.samples // data.read_together(groups.data_size)
        self.bounds = microbatch_bounds(config)

    def read(self, step: int) -> tuple[StepBatch, StepPlan]:
        """The batch of `step` for this rank, and its plan. A collective of the replica.

        Raises what the thread that has prepared it met.
        """
        ahead, self._ahead = self._ahead, None
        # The first one here: loader processes are forks of the thread that begins to read.
        ready = self._prepare() if ahead is None else ahead.result()
        self.steps += 1
        if step < self.config.steps:
            self._ahead = BackgroundWork(self._prepare, "next step")
        batch = distribute(ready.step, self.frame_shape, self.groups, self.shares)
        check_tokens(batch, self.config, step)
        return batch, ready.plan

    def _prepare(self) -> PreparedStep:
        """The next step."""
        batches = self.batches and self._until_stopped(self.batches)
        multiple = self.config.data.pad_multiple
        try:
            step = assemble(batches, self.reads, self.bounds, multiple, self.groups)
        except StopReading:
            end_reading(self.groups)
            raise
        plan = StepPlan(step.microbatches, self.config, self.loss)
        return PreparedStep(step, plan)

    def _until_stopped(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in batches:
            if self._stopping:
                raise StopReading
            yield batch

    def settle(self) -> None:
        """Waits until the next step has been prepared, and `groups.host` is free."""
        if self._ahead is not None:
            self._ahead.wait()

    def stop(self) -> None:
        """Ends the preparation of a next step, which nobody will ask for."""
        self._stopping = True
        if self._ahead is not None:
            self._ahead.wait(self.LONGEST_STOP_S)

    def distribute(self, batches: Iterator[MicroBatch] | None, reads: int) -> StepBatch:
        """The next `reads` of `batches` (of the leader), distributed to the replica's ranks."""
        multiple = self.config.data.pad_multiple
        return read_step(
            batches, reads, self.bounds, multiple, self.frame_shape, self.groups, self.shares
        )

    def state(self) -> dict[str, Any] | None:
        """Where the run stands in its data, for run.json (on leaders, the same on each)."""
        return self.loader.state(self.steps).to_dict() if self.loader else None

    def close(self) -> None:
        """Ends the thread and the loader's worker processes."""
        self.stop()
        if self.loader is not None:
            self.loader.close()


def microbatch_bounds(config: Config) -> Bounds:
    """How the samples of a step are packed."""
    parallel = config.parallel
    return Bounds(
        config.data.micro_batch,
        config.microbatch_tokens,
        config.microbatch_frames,
        least=parallel.pipeline,  # with fewer, stages would have nothing to do
        # What megatron's interleaved schedule asks for.
        multiple=parallel.pipeline if parallel.virtual > 1 else 1,
    )


def encode_config(config: Config) -> EncodeConfig:
    """How samples become tensors in this run."""
    stage, data = config.stage, config.data
    return EncodeConfig(
        tokenizer=data.tokenizer,
        sequence_length=config.sequence_length,
        tile_size=config.model.vision.image_size,
        max_tiles=data.max_tiles,
        video_fps=stage.video_fps,
        video_min_frames=stage.video_min_frames,
        video_max_frames=stage.video_max_frames,
        prompt=cast(Any, stage.prompt),  # validated
        swap_probability=stage.swap_probability,
        video_threads=data.video_threads,
    )


def check_tokens(batch: StepBatch, config: Config, step: int) -> None:
    """Refuses tokens that the embedding or the head has no row for: where these are sharded over
    tensor ranks, nothing else would notice. Every rank of a replica has the same tokens.
    """
    text = config.model.text
    embedded = text.vocab_size + text.extra_embedding_rows
    for part in batch.microbatches:
        for name, values, rows in (
            ("token", part.tokens, embedded),
            ("label", part.labels, text.vocab_size),
        ):
            most = int(values.max())
            if most >= rows:
                raise ValueError(
                    f"step {step}: {name} {most}: the vocabulary has {rows}; samples of the step: "
                    f"{', '.join(batch.keys)}"
                )


class Epochs:
    """How often each source that is used has been read in this run."""

    def __init__(self, order: dict[str, Any]):
        """Goes on from where the run stands in its data (`StepReader.state`)."""
        sources = OrderState.from_dict(order).sources
        self.sizes = {name: source.samples for name, source in sources.items()}
        self.samples = {name: source.taken for name, source in sources.items()}

    def add(self, samples: dict[str, int]) -> dict[str, float]:
        """Counts a step's samples by source; returns the epochs so far."""
        for name in self.sizes:
            self.samples[name] += samples[name]
        return {name: self.samples[name] / size for name, size in self.sizes.items()}


class BadSamples:
    """The share of unusable samples among the last `WINDOW` that the job has tried.

    A window, since a long run would take days to notice that its storage is gone.
    """

    WINDOW = 10_000  # samples, or one step's where these are more
    LEAST = 10  # unusable ones, before their share means anything

    def __init__(self, limit: float):
        self.limit = limit
        self._steps: deque[tuple[int, Counter[str]]] = deque()  # samples tried; unusable: why
        self._tried, self._bad = 0, Counter[str]()

    def add(self, step: int, good: int, bad: Mapping[str, int]) -> None:
        """Counts a step's samples, the bad ones by reason.

        Raises RuntimeError where more than the limit is unusable.
        """
        self._steps.append((good + sum(bad.values()), Counter(bad)))
        self._tried += self._steps[-1][0]
        self._bad += self._steps[-1][1]
        while self._tried - self._steps[0][0] >= self.WINDOW:
            tried, of_them = self._steps.popleft()
            self._tried, self._bad = self._tried - tried, self._bad - of_them
        count = self._bad.total()
        ratio = count / self._tried
        if count >= self.LEAST and ratio > self.limit:
            raise RuntimeError(
                f"step {step}: {count} of the last {self._tried} samples could not be used "
                f"({ratio:.1%}, data.max_bad_ratio={self.limit:.1%}; {reasons(self._bad)}): see "
                "the warnings above"
            )


class Audit:
    """The sample keys of each step of a replica, in its audit.RANK.jsonl (on its leader)."""

    def __init__(self, run: Path, data_rank: int):
        self.path = run / f"audit.{data_rank:05d}.jsonl"

    @staticmethod
    def cut(run: Path, last: int) -> None:
        """Removes the steps after `last`, which the job goes on from, from all replicas' files."""
        for path in run.glob("audit.*.jsonl"):
            json_lines.cut(path, last)

    def write(self, step: int, keys: list[str]) -> None:
        """Appends the keys of a step."""
        json_lines.append(self.path, {"step": step, "keys": keys})
