"""What a step computes, planned on the host while the device does something else."""

from __future__ import annotations

from dataclasses import astuple

import torch
from torch import Tensor

from moss_train.config import Config
from moss_train.model.loss import LossOptions
from moss_train.parallel.distribute import TextBatch
from moss_train.parallel.schedule import DecoderInput, plan_inputs
from moss_train.train.flops import StepCounts, count_microbatch
from moss_train.transfer import Staged


class StepPlan:
    """The decoder's inputs of a step, and what they count to; goes to the device in one copy.

    inputs: of each microbatch, without the states of its frames.
    counts: of the replica: those of StepCounts, then its tokens with padding, int64.
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
        self.counts = torch.tensor([*astuple(counts), padded])
        self._staged = Staged(self)

    def forget_states(self) -> None:
        """Frees the states of all frames, once the decoder has done with them."""
        for item in self.inputs:
            item.frames.states = None

    def move(self) -> None:
        """To the device, where it has not been moved yet."""
        self._staged.move()
