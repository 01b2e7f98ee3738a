"""One pass of a step's microbatches through the decoder, by megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from moss_train import hardware
from moss_train.model.frame_plan import FramePlan, plan_frames
from moss_train.model.loss import LossOptions, Targets, find_targets
from moss_train.model.packed_text import PackedText
from moss_train.model.projector import pooled_tokens
from moss_train.model.shape_grid import rounds_lengths
from moss_train.model.vision import tiles_used
from moss_train.model_config import ModelConfig
from moss_train.parallel.distribute import TextBatch
from moss_train.transfer import move


@dataclass
class DecoderInput:
    """One microbatch as the decoder takes it."""

    on_device: ClassVar = ("text", "frames", "targets")

    text: PackedText
    frames: FramePlan
    targets: Targets


def decoder_input(
    tokens: Tensor,
    labels: Tensor,
    lengths: list[int],
    plan: FramePlan,
    states: Tensor,
    options: LossOptions,
) -> DecoderInput:
    """Moves one microbatch from the host, where its attention is planned, to the device.

    Args:
        tokens, labels: int64 `[T]`, packed; labels are not shifted.
        lengths: tokens of each sequence; padding follows the last.
        plan: of the microbatch's N frames.
        states: projected frames `[N, T x P, H]`, already on the device.
        options: of the loss.
    """
    item = DecoderInput(PackedText(tokens, lengths), plan, find_targets(labels, lengths, options))
    move(item)
    plan.states = states
    return item


def plan_inputs(
    batches: list[TextBatch], model: ModelConfig, max_tiles: int, options: LossOptions
) -> list[DecoderInput]:
    """Plans the attention and the loss of each microbatch, on the host.

    The caller moves them to the device, and gives them their states (`FramePlan.states`).

    Args:
        max_tiles: T.
        options: of the loss.
    """
    inputs = []
    for batch in batches:
        plan = plan_frames(
            batch.frame_sequences,
            batch.frame_positions,
            batch.lengths,
            len(batch.tokens),
            tiles=tiles_used(batch.ratio_ids, model.vision).clamp(max=max_tiles),
            max_tiles=max_tiles,
            attend_all=model.tokens_before_first_frame == "attend_all",
            rounded=rounds_lengths(model),
            flex=pooled_tokens(model) if model.attention == "flex" else None,
        )
        text = PackedText(batch.tokens, batch.lengths, rounds_lengths(model))
        targets = find_targets(batch.labels, batch.lengths, options, _frame_tokens(batch))
        inputs.append(DecoderInput(text, plan, targets))
    return inputs


def _frame_tokens(batch: TextBatch) -> Tensor:
    """Positions of the frames among the tokens of a microbatch `[N]`."""
    starts = torch.tensor([0, *batch.lengths]).cumsum(0)
    return starts[batch.frame_sequences] + batch.frame_positions


def run_schedule(
    chunks: Sequence[nn.Module],
    inputs: list[DecoderInput],
    total: Tensor,
    ended: Callable[[str], None] = lambda phase: None,
    forward_only: bool = False,
) -> Tensor:
    """Forward and backward of all microbatches of a step. A collective.

    Args:
        chunks: this rank's decoder chunks, wrapped for data parallelism or bare.
        total: labels in the global batch, fp32 scalar on the device.
        ended: told of each end of a "forward" of a chunk, and of the "backward" before it: all
            else, what a pipeline waits for included.
        forward_only: nothing is differentiated.

    Returns:
        Sum of the microbatches' losses on the last stage, zero on the others.
    """

    def forward(iterator: Iterator[DecoderInput], chunk: nn.Module):
        item = next(iterator)
        ended("backward")
        loss = chunk(item.text, item.frames, item.targets, total)
        ended("forward")
        return loss, _report

    losses = _schedule(chunks, inputs, forward, forward_only=forward_only)
    if not losses:
        return torch.zeros((), device=hardware.device())
    return torch.stack(losses).sum()


def run_logits(
    chunks: Sequence[nn.Module],
    inputs: list[DecoderInput],
    reduced: Callable[[DecoderInput, Tensor], Tensor] = lambda item, logits: logits,
    selected: bool = False,
) -> list[Tensor]:
    """What `reduced` makes of each microbatch's logits on the last stage, `[]` on the others. A
    collective.

    selected: logits `[n, V]` of the targets' n positions alone; else of all tokens `[T, V]`.
    """

    def forward(iterator: Iterator[DecoderInput], chunk: nn.Module):
        item = next(iterator)
        targets = item.targets if selected else None
        found = chunk(item.text, item.frames, targets)
        return found, lambda logits, non_loss_data: reduced(item, logits)

    return _schedule(chunks, inputs, forward, forward_only=True, collect_non_loss_data=True)


def _schedule(
    chunks: Sequence[nn.Module],
    inputs: list[DecoderInput],
    forward: Callable[[Iterator[DecoderInput], nn.Module], Any],
    **options: bool,
) -> list[Tensor]:
    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(inputs) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(inputs),
        seq_length=len(inputs[0].text.tokens),
        micro_batch_size=1,  # the sequences of a microbatch are one packed sequence to megatron
        **options,
    )


def _report(loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # megatron's triple: what to differentiate, a token count that we do not use, what to collect
    return loss, torch.ones((), dtype=torch.int, device=loss.device), loss.detach()
