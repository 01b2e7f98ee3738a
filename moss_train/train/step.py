"""One optimizer step, from a distributed batch to updated weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moss_train import hardware
from moss_train.config import Config
from moss_train.model.loss import LossOptions
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.distribute import StepBatch
from moss_train.parallel.exchange import FrameExchange
from moss_train.parallel.gradients import reduce_gradients
from moss_train.parallel.schedule import DecoderInput, decoder_inputs, run_schedule
from moss_train.train.flops import StepCounts, count_microbatch
from moss_train.train.guard import Guard
from moss_train.train.optimizer import TrainState


@dataclass
class StepResult:
    """The result of a step, over the whole job.

    loss: of the global batch, per label. padded_tokens: tokens with padding.
    sources: samples by source.
    refused: why the weights were not updated; None: they were.
    stop: how many ranks asked to stop (a signal).
    data_wait_s, memory_gb: of the rank that waited longest, used most.
    """

    loss: float
    grad_norm: float
    refused: str | None
    counts: StepCounts
    padded_tokens: int
    skipped: int
    sources: dict[str, int]
    frames_per_rank_max: int
    frames_per_rank_mean: float
    stop: int
    data_wait_s: float
    memory_gb: float


class StepDecision:
    """Whether a step may update the weights, made by all ranks together.

    The optimizer asks between the gradient norm and the update. What all ranks need the maximum of
    travels in the same reduction.

    maxima: over the ranks, of `peaks`, once it is decided.
    refused: why the weights may not be updated; None: they may.
    """

    def __init__(self, guard: Guard, loss: float, peaks: list[float]):
        """`loss`: of the global batch. `peaks`: of this rank."""
        self.guard, self.loss, self.maxima = guard, loss, peaks
        self.refused: str | None = None

    def __call__(self, grad_norm: float) -> bool:
        """Decides, once the gradient norm is known. A collective."""
        verdict = self.guard.verdict(self.loss, grad_norm)
        worst, *self.maxima = _reduce([verdict, *self.maxima], dist.ReduceOp.MAX)
        self.refused = self.guard.record(int(worst), self.loss)
        return self.refused is None


class TrainStep:
    """Runs steps on this rank; every rank calls it together."""

    def __init__(
        self,
        config: Config,
        model: MossVideo,
        state: TrainState,
        silence_id: int,
        guard: Guard,
    ):
        self.config, self.model, self.state, self.guard = config, model, state, guard
        self.exchange = FrameExchange(config.model, model.encoder, model.groups)
        stage = config.stage
        self.loss = LossOptions(
            silence_id, stage.silence_weight, stage.label_smoothing, stage.z_loss
        )

    def __call__(
        self, batch: StepBatch, data_wait_s: float = 0.0, stop: bool = False
    ) -> StepResult:
        """Forward, backward and update on `batch`; `stop`: this rank wants the job to end."""
        own_loss, counts, padded = self.forward_backward(batch)
        frames = len(batch.frames)
        names = [source.name for source in self.config.data.sources]
        read = Counter(key.partition("/")[0] for key in batch.keys)
        sums = [own_loss.item() if self.model.groups.reports_loss else 0.0]
        sums += [sum(batch.skipped.values()), stop, frames, *(read[name] for name in names)]
        loss, skipped, stops, encoded, *samples = _reduce(sums, dist.ReduceOp.SUM)
        peaks = [frames, data_wait_s, hardware.peak_memory_gb()]
        decision = StepDecision(self.guard, loss, peaks)
        grad_norm = self.state.update(decision)
        most_frames, longest_wait, most_memory = decision.maxima
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            refused=decision.refused,
            counts=counts,
            padded_tokens=padded,
            skipped=int(skipped),
            sources=dict(zip(names, map(int, samples), strict=True)),
            frames_per_rank_max=int(most_frames),
            frames_per_rank_mean=encoded / dist.get_world_size(),
            stop=int(stops),
            data_wait_s=longest_wait,
            memory_gb=most_memory,
        )

    def forward_backward(self, batch: StepBatch) -> tuple[Tensor, StepCounts, int]:
        """Reduced gradients of `batch`; its loss on this rank, counts and padded tokens."""
        self.state.zero_gradients()
        inputs = self.prepare(batch)
        counts, padded = self._count(batch, inputs)
        total = torch.tensor(float(counts.labels + counts.text_labels), device=hardware.device())
        loss = run_schedule(self.state.chunks, inputs, total)
        self.exchange.return_gradient()
        state = self.state
        reduce_gradients(state.wrapped_chunks, state.encoder, self.model.groups)
        return loss, counts, padded

    def prepare(self, batch: StepBatch, loss: LossOptions | None = None) -> list[DecoderInput]:
        """Encodes the frames and plans each microbatch; `loss`: None for that of training."""
        states = self.exchange.encode(batch)
        return decoder_inputs(
            batch.microbatches,
            states,
            self.config.model,
            self.config.data.max_tiles,
            loss or self.loss,
        )

    def _count(self, batch: StepBatch, inputs: list[DecoderInput]) -> tuple[StepCounts, int]:
        """Counts of the step over all replicas, and its tokens with padding."""
        counts = StepCounts()
        for text, item in zip(batch.microbatches, inputs, strict=True):
            counts += count_microbatch(
                text.lengths, item.targets.positions[: item.targets.count], item.frames
            )
        padded = sum(len(item.text.tokens) for item in inputs)
        sums = torch.tensor([*astuple(counts), padded], device=hardware.device())
        dist.all_reduce(sums, group=self.model.groups.decoder.dp)
        *totals, padded = sums.tolist()
        return StepCounts(*totals), padded


def _reduce(values: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
    """Reduces a few numbers over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=hardware.device())
    dist.all_reduce(tensor, op)
    return tensor.tolist()
