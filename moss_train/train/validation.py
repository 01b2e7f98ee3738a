"""Validation during training, per source and modality, on the same samples each time."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.batch import IGNORED_LABEL, EncodedSample, MicroBatch, Unlearned, collate
from data_pipeline.encode import SampleEncoder
from data_pipeline.loader.remote import samples_in_order
from data_pipeline.schema import SampleError
from data_pipeline.shards import read_samples
from data_pipeline.stores import is_url
from data_pipeline.tokens import load_tokenizer
from moss_train import hardware
from moss_train.data_config import SourceConfig
from moss_train.log import log
from moss_train.model.loss import LossOptions
from moss_train.parallel.schedule import run_schedule
from moss_train.train.data import StepReader, encode_config
from moss_train.train.heartbeat import beat, uncounted
from moss_train.train.step import TrainStep, gather_counts
from moss_train.train.unlearned import Totals

T = TypeVar("T")


class Validator:
    """Measures `data.eval_sources` per label: the loss, without smoothing and z-loss, and the
    accuracy: the share of labels that are the likeliest token after what stands before them.

    The first `data.eval_samples` of each source are shared out to the replicas, whatever the
    layout, so that the result does not depend on it.
    """

    def __init__(self, step: TrainStep, reader: StepReader):
        self.step, self.reader, self.config = step, reader, step.config
        self.groups = step.model.groups
        self.options = LossOptions(step.loss.silence_id, step.loss.silence_weight, count_hits=True)
        encode = encode_config(self.config)
        self.encoder = SampleEncoder(encode, load_tokenizer(encode.tokenizer))
        self._warned: set[str] = set()
        self._reset_counts()

    def __call__(self, stop_requests: Sequence[float] = ()) -> dict[str, Any] | None:
        """What `validation` returns; None where it was cut short. A collective.

        stop_requests: times of signals to stop, filled by their handler; a replica whose leader
        got one reads no further.
        """
        self._reset_counts()
        self.stop_requests = stop_requests
        self.reader.settle()
        self.step.state.gather_parameters()
        sources = self.config.data.eval_sources
        with torch.no_grad(), uncounted():  # each replica has its own samples
            sums = torch.stack([self._sums(source) for source in sources])
        beat("after validation")
        dist.all_reduce(sums)
        own = [self.cut, self.samples, *astuple(self.unlearned)]
        counts = torch.tensor(own, device=sums.device)
        dist.all_reduce(counts)
        cut, samples, *unlearned = counts.tolist()
        if cut:
            return None
        skipped = gather_counts(self.skipped)
        measured = validation(sources, sums.tolist(), samples, skipped, Unlearned(*unlearned))
        Totals.of([measured]).warn(self._warned, "validation: ")
        return measured

    def _reset_counts(self) -> None:
        """Sets this rank's counts of a validation to zero: whether it was cut short, samples read,
        samples left out, and what was cut from the others (`Unlearned`)."""
        self.cut = False
        self.samples, self.skipped, self.unlearned = 0, Counter[str](), Unlearned()

    def _sums(self, source: SourceConfig) -> torch.Tensor:
        """This rank's part of (losses, labels, hits), summed over `source`, fp64 `[3]`."""
        samples = self._samples(source) if self.groups.is_leader else iter(())
        sums = torch.zeros(3, dtype=torch.float64, device=hardware.device())
        while reads := self._agree(batches := self._next(samples)):
            beat("validation")
            batch = self.reader.distribute(iter(batches) if self.groups.is_leader else None, reads)
            inputs = self.step.prepare(batch, self.options).inputs
            one = torch.ones((), device=hardware.device())
            loss = run_schedule(self.step.state.chunks, inputs, one, forward_only=True)
            if self.groups.reports_loss:
                sums[0] += loss
                sums[1] += sum(item.targets.count for item in inputs)
                for item in inputs:
                    if item.targets.hits is not None:
                        sums[2] += item.targets.hits
        return sums

    def _agree(self, batches: list[MicroBatch]) -> int:
        """The number of batches that the replica's leader has."""
        if self.groups.replica.size() == 1:
            return len(batches)
        count = torch.tensor(len(batches))
        leader = dist.get_global_rank(self.groups.replica, 0)
        dist.broadcast(count, leader, group=self.groups.host)
        return int(count)

    def _next(self, samples: Iterator[EncodedSample]) -> list[MicroBatch]:
        """Batches of as many samples as a training step has, or of those that are left."""
        if self.stop_requests:
            self.cut = True
            return []
        beat("data")
        multiple = self.reader.bounds.multiple
        chosen = list(islice(samples, self.reader.samples))
        while chosen and len(chosen) < multiple:  # no stage's microbatch may be empty
            silent = torch.full_like(chosen[0].labels, IGNORED_LABEL)
            chosen.append(replace(chosen[0], labels=silent))
        return [collate([sample], pad_token_id=0) for sample in chosen]

    def _samples(self, source: SourceConfig) -> Iterator[EncodedSample]:
        rank, size = self.groups.data_rank, self.groups.data_size
        data = self.config.data
        if is_url(source.path):
            raw = samples_in_order(source.path, data.stores, rank, data.eval_samples, size)
        else:
            raw = islice(read_samples(source.path), rank, data.eval_samples, size)
        for key, parts in self._readable(source, raw):
            try:
                encoded = self.encoder.encode(f"{source.name}/{key}", parts)
            except SampleError as error:
                self.skipped[error.reason] += 1
                log.warning("validation: left out %s", error)
            else:
                self.samples += 1
                self.unlearned += encoded.unlearned
                yield encoded

    def _readable(self, source: SourceConfig, raw: Iterator[T]) -> Iterator[T]:
        """Samples until a shard cannot be read: that ends the source, not the job, which would come
        to it again after each start."""
        try:
            yield from raw
        except (OSError, ValueError, tarfile.TarError) as error:
            self.skipped["unreadable_shard"] += 1
            log.error("validation: the rest of %s is left out: %s", source.path, error)


def validation(
    sources: list[SourceConfig],
    sums: list[list[float]],
    samples: int,
    skipped: Mapping[str, int],
    unlearned: Unlearned,
) -> dict[str, Any]:
    """Means over labels of (losses, labels, hits) of each source; None where there is no label.

    `{loss, source: {name: loss}, modality: {name: loss}, accuracy: {all, source, modality},
    samples, labels, skipped_samples, skipped_reasons: {reason: number}, truncated_samples,
    truncated_labels, turns, masked_turns}`
    """
    modalities = sorted({source.modality for source in sources})
    pairs = list(zip(sources, sums, strict=True))

    def means(column: int) -> tuple[float | None, dict[str, Any]]:
        def mean(rows: list[list[float]]) -> float | None:
            labels = sum(row[1] for row in rows)
            return sum(row[column] for row in rows) / labels if labels else None

        return mean(sums), {
            "source": {source.name: mean([own]) for source, own in pairs},
            "modality": {m: mean([own for s, own in pairs if s.modality == m]) for m in modalities},
        }

    loss, losses = means(0)
    accuracy, accuracies = means(2)
    return {
        "loss": loss,
        **losses,
        "accuracy": {"all": accuracy, **accuracies},
        "samples": samples,
        "labels": int(sum(row[1] for row in sums)),
        "skipped_samples": sum(skipped.values()),
        "skipped_reasons": dict(skipped),
        **asdict(unlearned),
    }


def describe(measured: dict[str, Any]) -> str:
    """`loss 0.5 accuracy 0.8 (image 0.4 0.9, text 0.6 0.7)`"""

    def pair(loss: float | None, accuracy: float | None, words: tuple[str, str] = ("", "")) -> str:
        if loss is None or accuracy is None:
            return "without labels"
        return f"{words[0]}{loss:.4f} {words[1]}{accuracy:.3f}"

    accuracy = measured["accuracy"]
    parts = [f"{m} {pair(v, accuracy['modality'][m])}" for m, v in measured["modality"].items()]
    whole = pair(measured["loss"], accuracy["all"], ("loss ", "accuracy "))
    return f"{whole} ({', '.join(parts)})"
