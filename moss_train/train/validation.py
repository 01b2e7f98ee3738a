"""Validation loss during training, per source and modality, on the same samples each time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.batch import IGNORED_LABEL, EncodedSample, MicroBatch, collate
from data_pipeline.encode import SampleEncoder
from data_pipeline.schema import SampleError
from data_pipeline.shards import read_samples
from data_pipeline.tokens import load_tokenizer
from moss_train import hardware
from moss_train.config import SourceConfig
from moss_train.log import log
from moss_train.model.loss import LossOptions
from moss_train.parallel.schedule import run_schedule
from moss_train.train.data import StepReader, encode_config
from moss_train.train.step import TrainStep


class Validator:
    """Measures the loss on `data.eval_sources`: without smoothing and z-loss, per label.

    The first `data.eval_samples` of each source are shared out to the replicas, whatever the
    layout, so that the result does not depend on it.
    """

    def __init__(self, step: TrainStep, reader: StepReader):
        self.step, self.reader, self.config = step, reader, step.config
        self.groups = step.model.groups
        self.options = LossOptions(step.loss.silence_id, step.loss.silence_weight)
        encode = encode_config(self.config)
        self.encoder = SampleEncoder(encode, load_tokenizer(encode.tokenizer))
        self.unreadable = 0  # samples of this validation that this rank had to leave out

    def __call__(self) -> dict[str, Any]:
        """`loss`, `source`, `modality`: losses per label; `skipped_samples`. A collective."""
        self.unreadable = 0
        self.step.trainable.gather_parameters()
        sources = self.config.data.eval_sources
        with torch.no_grad():
            sums = torch.stack([self._sums(source) for source in sources])
        dist.all_reduce(sums)
        skipped = torch.tensor(self.unreadable, device=sums.device)
        dist.all_reduce(skipped)
        return validation(sources, sums.tolist(), int(skipped))

    def _sums(self, source: SourceConfig) -> torch.Tensor:
        """This rank's part of (sum of losses, labels) over the samples of `source`, fp64 `[2]`."""
        samples = self._samples(source) if self.groups.is_leader else iter(())
        judges = self.groups.is_last_stage and self.groups.decoder.tp.rank() == 0
        sums = torch.zeros(2, dtype=torch.float64, device=hardware.device())
        while reads := self._agree(batches := self._next(samples)):
            batch = self.reader.deal(iter(batches) if self.groups.is_leader else None, reads)
            inputs = self.step.prepare(batch, self.options)
            one = torch.ones((), device=hardware.device())
            loss = run_schedule(self.step.trainable.chunks, inputs, one, forward_only=True)
            if judges:
                sums[0] += loss
                sums[1] += sum(item.targets.count for item in inputs)
        return sums

    def _agree(self, batches: list[MicroBatch]) -> int:
        """How many batches the leader has."""
        count = torch.tensor(len(batches), device=hardware.device())
        leader = dist.get_global_rank(self.groups.replica, 0)
        dist.broadcast(count, leader, group=self.groups.replica)
        return int(count)

    def _next(self, samples: Iterator[EncodedSample]) -> list[MicroBatch]:
        """As many samples as a step of training has, or those that are left."""
        size, multiple = self.config.data.micro_batch, self.reader.bounds.multiple
        found = list(islice(samples, self.reader.reads * size))
        while found and len(found) < multiple:  # no stage's microbatch may be empty
            silent = torch.full_like(found[0].labels, IGNORED_LABEL)
            found.append(replace(found[0], labels=silent))
        return [
            collate(found[first : first + size], pad_token_id=0)
            for first in range(0, len(found), size)
        ]

    def _samples(self, source: SourceConfig) -> Iterator[EncodedSample]:
        rank, size = self.groups.data_rank, self.groups.data_size
        raw = islice(read_samples(source.path), rank, self.config.data.eval_samples, size)
        for key, parts in raw:
            try:
                yield self.encoder.encode(f"{source.name}/{key}", parts)
            except SampleError as error:
                self.unreadable += 1
                log.warning("validation: left out %s", error)


def validation(
    sources: list[SourceConfig], sums: list[list[float]], skipped: int
) -> dict[str, Any]:
    """Means over labels of (sum of losses, labels) of each source; None where there is no label."""

    def mean(wanted: list[list[float]]) -> float | None:
        labels = sum(count for _, count in wanted)
        return sum(loss for loss, _ in wanted) / labels if labels else None

    pairs = list(zip(sources, sums, strict=True))
    modalities = sorted({source.modality for source in sources})
    return {
        "loss": mean(sums),
        "source": {source.name: mean([own]) for source, own in pairs},
        "modality": {m: mean([own for s, own in pairs if s.modality == m]) for m in modalities},
        "skipped_samples": skipped,
    }
