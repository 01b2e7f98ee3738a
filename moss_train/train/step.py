"""One optimizer step, from a distributed batch to updated weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batch import Unlearned
from moss_train import hardware
from moss_train.config import Config
from moss_train.model.loss import LossOptions
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.distribute import StepBatch
from moss_train.parallel.exchange import FrameExchange
from moss_train.parallel.gradients import reduce_gradients
from moss_train.parallel.schedule import run_schedule
from moss_train.train.chunk_size import frames_per_chunk
from moss_train.train.flops import StepCounts
from moss_train.train.guard import Guard
from moss_train.train.optimizer import TrainState
from moss_train.train.phases import Phases
from moss_train.train.step_plan import StepPlan
from moss_train.train.warm_up import plan_kernels
from moss_train.transfer import HostCopy, to_device

_NAMES = [field.name for field in fields(StepCounts)]
_UNLEARNED = len(fields(Unlearned))


@dataclass
class StepResult:
    """The result of a step, over the whole job.

    loss: of the global batch, per label. weighted_loss: the same without balanced states, smoothing
        and z, as validation has it; None: the states are not balanced.
    padded_tokens: tokens with padding.
    sources: samples by source. skipped: samples left out on the way to this step, by reason.
    kept_frames: frames whose activations were kept, where the tower runs others again.
    refused: why the weights were not updated; None: they were.
    stop: how many ranks asked to stop (a signal).
    data_wait_s, memory_gb: of the rank that waited longest, used most.
    phase_s: seconds of each phase, of this rank alone (phases.py).
    """

    loss: float
    weighted_loss: float | None
    grad_norm: float
    refused: str | None
    counts: StepCounts
    padded_tokens: int
    skipped: dict[str, int]
    unlearned: Unlearned
    sources: dict[str, int]
    frames_per_rank_max: int
    frames_per_rank_mean: float
    kept_frames: int
    stop: int
    data_wait_s: float
    memory_gb: float
    phase_s: dict[str, float]


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
        chunk = frames_per_chunk(config, model, state)
        self.exchange = FrameExchange(config.model, model.encoder, model.groups, chunk)
        self.phases = Phases()
        self._kernels_planned = False
        stage = config.stage
        self.balanced = config.loss.name == "state_balanced"
        self.loss = LossOptions(
            silence_id,
            stage.silence_weight,
            stage.label_smoothing,
            stage.z_loss,
            focal_gamma=config.loss.focal_gamma if self.balanced else None,
        )

    def __call__(
        self,
        batch: StepBatch,
        plan: StepPlan | None = None,
        data_wait_s: float = 0.0,
        stop: bool = False,
    ) -> StepResult:
        """Forward, backward and update on `batch`.

        Args:
            plan: of this batch; None: it is made here.
            stop: this rank wants the job to end.

        All is given to the device before the host reads what came of it, once, at the end. Whether
        the weights may be updated is decided by all ranks together, on the device.
        """
        self.phases = Phases()
        losses, counts = self.forward_backward(batch, plan)
        frames = len(batch.frames)
        names = [source.name for source in self.config.data.sources]
        read = Counter(key.partition("/")[0] for key in batch.keys)
        # Tensor ranks that share a tower encode the same frames.
        kept = 0 if self.model.groups.vision.tp.rank() else self.exchange.kept_frames
        own = [0.0, 0.0, sum(batch.skipped.values()), stop, frames, kept]
        own += [*astuple(batch.unlearned), *(read[name] for name in names)]
        sums, maxima = _numbers(own, [0.0, frames, data_wait_s, hardware.peak_memory_gb()])
        if self.model.groups.reports_loss:
            for number, own_loss in enumerate(losses):
                sums[number] = own_loss
        dist.all_reduce(sums)

        def refuses(grad_norm: Tensor) -> Tensor:
            maxima[0] = self.guard.verdict(sums[0], grad_norm)
            dist.all_reduce(maxima, dist.ReduceOp.MAX)
            return (maxima[0] > 0).float()

        grad_norm = self.state.update(refuses)
        self.phases.end("update")
        numbers = HostCopy(torch.cat((grad_norm[None], maxima, sums, counts.double())))
        return self._result(numbers.wait(), names, batch.skipped)

    def _result(
        self, numbers: list[float], names: list[str], own_skipped: Mapping[str, int]
    ) -> StepResult:
        """Makes the step's result of the numbers that the device returned, in the order of
        `__call__`."""
        norm, verdict, most_frames, longest_wait, most_memory, *rest = numbers
        loss, weighted, skipped, stops, encoded, kept, *rest = rest
        unlearned, rest = rest[:_UNLEARNED], rest[_UNLEARNED:]
        samples, (*counts, padded, _, _) = rest[: len(names)], rest[len(names) :]
        refused = self.guard.record(int(verdict), loss)
        if refused is not None:
            self.state.take_back()
        return StepResult(
            loss=loss,
            weighted_loss=weighted if self.balanced else None,
            grad_norm=norm,
            refused=refused,
            counts=StepCounts(*map(int, counts)),
            padded_tokens=int(padded),
            skipped=gather_counts(own_skipped) if skipped else {},
            unlearned=Unlearned(*map(int, unlearned)),
            sources=dict(zip(names, map(int, samples), strict=True)),
            frames_per_rank_max=int(most_frames),
            frames_per_rank_mean=encoded / dist.get_world_size(),
            kept_frames=int(kept),
            stop=int(stops),
            data_wait_s=longest_wait,
            memory_gb=most_memory,
            phase_s=self.phases.seconds(),
        )

    def forward_backward(
        self, batch: StepBatch, plan: StepPlan | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Reduced gradients of `batch`.

        Returns:
            This rank's loss, and the weighted one where the states are balanced and this rank has
            it; the counts of the step over all replicas (`StepPlan.counts`). All on the device.
        """
        plan = plan or StepPlan(batch.microbatches, self.config, self.loss)
        self._plan_kernels(plan)
        self.state.zero_gradients()
        plan = self.prepare(batch, self.loss, plan)
        counts = plan.counts
        dist.all_reduce(counts, group=self.model.groups.decoder.dp)
        labels, text_labels = (counts[_NAMES.index(name)] for name in ("labels", "text_labels"))
        total = (labels + text_labels).float()
        plan.weigh_states(counts[-2:])
        self.phases.end("plan")
        loss = run_schedule(self.state.chunks, plan.inputs, total, self._ended)
        self.phases.end("backward")
        plan.forget_states()
        self.exchange.return_gradient()
        state = self.state
        reduce_gradients(state.wrapped_chunks, state.encoder, self.model.groups)
        self.phases.end("exchange")
        weighted = [t.weighted for t in plan.targets if t.weighted is not None]
        return [loss, torch.stack(weighted).sum()] if weighted else [loss], counts

    def _plan_kernels(self, plan: StepPlan) -> None:
        """Plans the kernels of torch's attention, before the first step on a GPU (warm_up.py)."""
        config, first = self.config, not self._kernels_planned
        self._kernels_planned = True
        # Parameters that are gathered while a step computes are there in a step alone.
        gathered = not config.parallel.overlap_param_gather
        if first and gathered and hardware.on_accelerator() and config.model.attention == "sdpa":
            plan.move()
            plan_kernels(self.model.chunks, plan.inputs)
            self.phases.end("plan")

    def _ended(self, phase: str) -> None:
        """Takes what the schedule (`run_schedule`) tells: before each forward of a chunk, and after
        it."""
        self.phases.end(phase)
        if phase == "backward":
            self.exchange.begin_microbatch()
            self.phases.end("exchange")

    def prepare(
        self, batch: StepBatch, loss: LossOptions, plan: StepPlan | None = None
    ) -> StepPlan:
        """Encodes the frames, and plans what has not been planned. All on the device."""
        states = self.exchange.encode(batch)  # the device works on that while the host plans
        self.phases.end("encode")
        plan = plan or StepPlan(batch.microbatches, self.config, loss)
        plan.move()
        for item, own in zip(plan.inputs, states, strict=True):
            item.frames.states = own
        return plan


def _numbers(*rows: list[float]) -> list[Tensor]:
    return to_device([torch.tensor(row, dtype=torch.float64) for row in rows])


def gather_counts(own: Mapping[str, int]) -> dict[str, int]:
    """Sums the counts of all ranks, whose keys may differ. A collective."""
    everywhere: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, dict(own))
    return dict(sum(map(Counter, everywhere), Counter()))
