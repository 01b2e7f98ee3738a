"""One pass of a step's microbatches through the decoder, by megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from moss_train import hardware
from moss_train.config import ModelConfig
from moss_train.model.frame_plan import FramePlan, plan_frames
from moss_train.model.loss import LossOptions, Targets, find_targets
from moss_train.model.packed_text import PackedText
from moss_train.model.vision import tiles_used
from moss_train.parallel.distribute import TextBatch


@dataclass
class DecoderInput:
    """One microbatch as the decoder takes it, on the device."""

    text: PackedText
    frames: FramePlan
    targets: Targets


def prepare(
    batches: list[TextBatch],
    states: list[Tensor],
    model: ModelConfig,
    max_tiles: int,
    options: LossOptions,
) -> list[DecoderInput]:
    """Plans attention and loss of each microbatch on the host, then moves it to the device.

    Args:
        states: projected frames of each microbatch `[N, T x P, H]`.
        max_tiles: T.
        options: of the loss.
    """
    device = hardware.device()
    inputs = []
    for batch, own in zip(batches, states, strict=True):
        frames = plan_frames(
            batch.frame_sequences,
            batch.frame_positions,
            batch.lengths,
            len(batch.tokens),
            tiles=tiles_used(batch.ratio_ids, model.vision).clamp(max=max_tiles),
            max_tiles=max_tiles,
            attend_all=model.tokens_before_first_frame == "attend_all",
        ).to(device)
        frames.states = own
        targets = find_targets(batch.labels, batch.lengths, options)
        for name in ("positions", "tokens", "weights"):
            setattr(targets, name, getattr(targets, name).to(device))
        inputs.append(
            DecoderInput(PackedText(batch.tokens.to(device), batch.lengths), frames, targets)
        )
    return inputs


def run_schedule(
    chunks: Sequence[nn.Module],
    inputs: list[DecoderInput],
    total: Tensor,
    forward_only: bool = False,
) -> Tensor:
    """Forward and backward of all microbatches of a step.

    Args:
        chunks: this rank's decoder chunks, wrapped for data parallelism or bare.
        total: labels in the global batch, fp32 scalar on the device.

    Returns:
        Sum of the microbatches' losses on the last stage, zero on the others. With
        `forward_only`, nothing is differentiated.
    """

    def forward(iterator: Iterator[DecoderInput], chunk: nn.Module):
        item = next(iterator)
        return chunk(item.text, item.frames, item.targets, total), _report

    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(inputs) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(inputs),
        seq_length=len(inputs[0].text.tokens),
        micro_batch_size=1,  # the sequences of a microbatch are one packed sequence to megatron
        forward_only=forward_only,
    )
    if not losses:
        return torch.zeros((), device=hardware.device())
    return torch.stack(losses).sum()


def _report(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # megatron's triple: what to differentiate, a token count that we do not use, what to collect
    return loss, torch.ones((), dtype=torch.int, device=loss.device), loss.detach()
