"""Plans the kernels of attention before the first step, and logs how far that is.

cuDNN plans a kernel for each shape that it has not met, 0.14 s each (an H200). Of a first step all
are new: a minute may pass for which a job would say nothing, and its first step look slow. So each
shape is run once, forward and backward, by a layer of its own kind.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moss_train import hardware
from moss_train.log import log
from moss_train.model.cross_attention import CrossAttentionLayer
from moss_train.model.decoder import Decoder
from moss_train.model.projector import pooled_tokens
from moss_train.model.rope import Rotation
from moss_train.parallel.schedule import DecoderInput

EVERY_S = 5.0  # between two lines


def plan_kernels(chunks: Sequence[Decoder], inputs: Sequence[DecoderInput]) -> None:
    """Runs an attention layer of each kind that this rank has over those microbatches of a step
    that have new shapes. A collective of the tensor ranks. What it adds to gradients is no step's:
    they are to be cleared.

    Args:
        inputs: planned, and on the device.
    """
    planned: set[Any] = set()
    new = []
    for item in inputs:
        shapes = set(_shapes(item))
        if not shapes <= planned:
            new.append(item)
        planned |= shapes
    first = {type(x): x for chunk in chunks for x in reversed([*chunk.layers.values()])}
    begun = logged_at = time.monotonic()
    for number, item in enumerate(new):
        if time.monotonic() - logged_at > EVERY_S:
            logged_at = time.monotonic()
            log.info("planning kernels of attention: %d of %d microbatches", number, len(new))
        for layer in first.values():
            _run(chunks[0], layer, item)
    hardware.synchronize()
    seconds = time.monotonic() - begun
    log.info("planned kernels of attention for %d shapes in %.1f s", len(planned), seconds)


def _shapes(item: DecoderInput) -> Iterator[tuple]:
    """What tells calls of attention apart."""
    for group in item.text.groups:
        yield ("text", *group.shape)
    frames = item.frames
    if frames.padded is not None:
        mask = frames.padded.mask
        yield ("padded", *frames.padded.shape, mask if mask is None else mask.shape)
        return
    for block in frames.blocks:
        rows = None if block.mask is None else len(block.mask)
        yield ("block", block.size, block.last - block.first, rows)


def _run(chunk: Decoder, layer: nn.Module, item: DecoderInput) -> None:
    """Forward and backward of a layer, over zeros."""
    text, frames, config = item.text, item.frames, chunk.config
    made = {"device": text.tokens.device, "dtype": config.params_dtype, "requires_grad": True}
    width = chunk.text.hidden_size
    parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
    inputs = [torch.zeros(len(text.tokens) // parts, 1, width, **made)]

    def rotation(positions: Tensor) -> Rotation:
        return Rotation.of(chunk.text, positions, config.params_dtype, config.kernels.rotate)

    if not isinstance(layer, CrossAttentionLayer):
        out = layer(*inputs, text, rotation(text.positions))
    elif len(frames.tokens):
        rows = frames.tiles.shape[1] * pooled_tokens(chunk.model)
        inputs.append(torch.zeros(frames.count, rows, width, **made))
        masks = chunk.text.shared_heads, pooled_tokens(chunk.model), config.params_dtype
        own = frames.with_masks(*masks)
        own.states = inputs[1]
        rotations = rotation(text.positions[frames.tokens]), rotation(frames.positions)
        out = layer(inputs[0], own, *rotations)
    else:
        return
    torch.autograd.grad(out, inputs, torch.ones_like(out))
