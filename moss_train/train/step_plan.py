"""What a step computes, planned on the host while the device does something else."""

from __future__ import annotations

from dataclasses import astuple

import torch
from torch import Tensor

from moss_train.config import Config
from moss_train.model.loss import LossOptions, Targets
from moss_train.model.states import count_states, state_weights
from moss_train.parallel.distribute import TextBatch
from moss_train.parallel.schedule import DecoderInput, plan_inputs
from moss_train.train.flops import StepCounts, count_microbatch
from moss_train.transfer import Staged


class StepPlan:
    """The decoder's inputs of a step, and what they count to; goes to the device in one copy.

    inputs: of each microbatch, without the states of its frames.
    counts: of the replica: those of StepCounts, its tokens with padding, and its labels of the
        states silence and begin of speech (0 where the loss does not balance them), int64.
    """

    on_device = ("inputs", "counts")
    inputs: list[DecoderInput]
    counts: Tensor

    def __init__(self, text: list[TextBatch], config: Config, loss: LossOptions):
        self.inputs = plan_inputs(text, config.model, config.data.max_tiles, loss)
        counts = StepCounts()
        for batch, item in zip(text, self.inputs, strict=True):
            counts += count_microbatch(
                batch.lengths, item.targets.positions[: item.targets.count], item.frames
            )
        padded = sum(len(item.text.tokens) for item in self.inputs)
        self.counts = torch.cat((torch.tensor([*astuple(counts), padded]), self._states()))
        self._staged = Staged(self)

    def _states(self) -> Tensor:
        states = [t.states[: t.count] for t in self.targets if t.states is not None]
        return count_states(torch.cat(states)) if states else torch.zeros(2, dtype=torch.int64)

    def weigh_states(self, counts: Tensor) -> None:
        """Tells the targets what a state weighs, from the states' counts in the global batch `[2]`;
        nothing where the loss does not balance them."""
        targets = [t for t in self.targets if t.states is not None]
        weights = state_weights(counts) if targets else None
        for own in targets:
            own.state_weights = weights

    @property
    def targets(self) -> list[Targets]:
        """The targets of each microbatch."""
        return [item.targets for item in self.inputs]

    def forget_states(self) -> None:
        """Frees the states of all frames, once the decoder has done with them."""
        for item in self.inputs:
            item.frames.states = None

    def move(self) -> None:
        """Moves all of it to the device, where it has not been moved yet."""
        self._staged.move()
