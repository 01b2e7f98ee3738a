"""One optimizer step, from a distributed batch to updated weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moss_train import hardware
from moss_train.config import Config
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.distribute import StepBatch
from moss_train.parallel.exchange import FrameExchange
from moss_train.parallel.gradients import reduce_gradients
from moss_train.parallel.schedule import DecoderInput, prepare, run_schedule
from moss_train.train.optimizer import Trainable


@dataclass
class StepResult:
    """What a step did, over the whole job.

    tokens: without padding; padded_tokens: with it. attended: (token, frame) pairs of the
    cross-attention. squares: sum over rows of padded length squared (self-attention).
    stop: how many ranks asked to stop (a signal).
    """

    loss: float
    grad_norm: float
    labels: int
    tokens: int
    padded_tokens: int
    squares: int
    attended: int
    frames: int
    skipped: int
    frames_per_rank_max: int
    frames_per_rank_mean: float
    stop: int


class TrainStep:
    """Runs steps on this rank; every rank calls it together."""

    def __init__(self, config: Config, model: MossVideo, trainable: Trainable, silence_id: int):
        self.config, self.model, self.trainable = config, model, trainable
        self.exchange = FrameExchange(config.model, model.encoder, model.groups)
        self.silence = (silence_id, config.stage.silence_weight)

    def __call__(self, batch: StepBatch, stop: bool = False) -> StepResult:
        """Forward, backward and update on `batch`; `stop`: this rank wants the job to end."""
        self.trainable.zero_gradients()
        inputs = self.prepare(batch)
        counts = self._count(batch, inputs)
        loss = run_schedule(self.trainable.chunks, inputs, counts[0].float())
        self.exchange.return_gradient()
        groups = self.model.groups
        reduce_gradients(self.trainable.wrapped_chunks, self.trainable.encoder, groups)
        _, grad_norm, _ = self.trainable.optimizer.step()
        self.trainable.scheduler.step(1)
        return self._result(batch, loss, float(grad_norm or 0.0), counts.tolist(), stop)

    def prepare(self, batch: StepBatch) -> list[DecoderInput]:
        """Encodes the frames and plans each microbatch."""
        states = self.exchange.encode(batch)
        return prepare(
            batch.microbatches, states, self.config.model, self.config.data.max_tiles, self.silence
        )

    def _count(self, batch: StepBatch, inputs: list[DecoderInput]) -> Tensor:
        """Labels, tokens, padded tokens, squares, attended pairs, frames: over all replicas."""
        rows, length = inputs[0].tokens.shape
        counts = [
            sum(item.targets.count for item in inputs),
            sum(int(text.lengths.sum()) for text in batch.microbatches),
            rows * length * len(inputs),
            rows * length**2 * len(inputs),
            sum(item.frames.attended() for item in inputs),
            sum(batch.counts),
        ]
        total = torch.tensor(counts, dtype=torch.int64, device=hardware.device())
        dist.all_reduce(total, group=self.model.groups.decoder.dp)
        return total

    def _result(
        self, batch: StepBatch, loss: Tensor, grad_norm: float, counts: list[int], stop: bool
    ) -> StepResult:
        groups = self.model.groups
        counted_here = groups.is_last_stage and groups.decoder.tp.rank() == 0
        skipped = sum(batch.skipped.values()) if groups.is_leader else 0
        own = len(batch.frames)
        device = hardware.device()
        sums = torch.tensor([0.0, skipped, stop, own], dtype=torch.float64, device=device)
        if counted_here:
            sums[0] = loss.double()
        dist.all_reduce(sums)
        most = torch.tensor([own], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        total_loss, skipped_all, stops, encoded = sums.tolist()
        labels, tokens, padded, squares, attended, frames = counts
        return StepResult(
            loss=total_loss,
            grad_norm=grad_norm,
            labels=labels,
            tokens=tokens,
            padded_tokens=padded,
            squares=squares,
            attended=attended,
            frames=frames,
            skipped=int(skipped_all),
            frames_per_rank_max=int(most),
            frames_per_rank_mean=encoded / dist.get_world_size(),
            stop=int(stops),
        )
