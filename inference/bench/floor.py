"""Computes the least time that this machine could need (a roofline): the time to read what must be
read, or to compute what must be computed, whichever is longer.

A pass reads every weight of the decoder once, and the keys and values that it attends. The speeds
of copies and matrix products are measured on this machine, not taken from a data sheet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline import devices
from inference.bench.measure import Clock, random_frames
from inference.engine.engine import Engine
from inference.engine.quantized_linear import QuantizedLinear
from inference.engine.tower_fp8 import Fp8Linear
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

# Bytes of the copy and rows of the square product that are timed; True: on an accelerator.
COPIED = {True: 1 << 30, False: 64 << 20}
SQUARE = {True: 8192, False: 1024}
TIMES = 5


@dataclass(frozen=True)
class Machine:
    """The speed of a device: bytes/s of a copy (read and written), FLOP/s of a product."""

    bytes_per_s: float
    flop_per_s: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, clock: Clock) -> Machine:
        """Measures a device: medians of TIMES copies and products, some tenths of a second."""
        fast = devices.is_accelerator(device)
        source = torch.zeros(COPIED[fast], dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        side = SQUARE[fast]
        a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        copy = _seconds(lambda: target.copy_(source), clock)
        product = _seconds(lambda: torch.mm(a, b), clock)
        return cls(2 * COPIED[fast] / copy, 2 * side**3 / product)

    def seconds(self, bytes: float, flop: float) -> float:
        """Seconds to read so many bytes and compute so many FLOPs at the same time."""
        return max(bytes / self.bytes_per_s, flop / self.flop_per_s)


def _seconds(work: Callable[[], Tensor], clock: Clock) -> float:
    """The median of TIMES calls, after one to warm up."""
    work()
    seconds = []
    for _ in range(TIMES):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds)


@dataclass(frozen=True)
class Work:
    """What a model must read and compute. A frame is encoded by tower and projector, and projected
    to keys and values by all cross-attention layers."""

    weights: int  # bytes that a pass of the decoder reads, without embeddings and projections
    flop: int  # FLOPs of a token in the decoder, its weights alone
    frame_weights: int  # bytes that encoding and projecting frames reads
    frame_flop: int  # FLOPs of encoding and projecting a frame
    text: int  # bytes of the keys and values of a cached token
    frame: int  # bytes of the keys and values of a cached frame

    @classmethod
    def of(cls, model: MossVideoForConditionalGeneration, engine: Engine, encode: int) -> Work:
        """Counts parameters as they are stored: 8-bit weights are a byte each, plus their scales.

        encode: `encoding_flop` of the model.
        """
        decoder, inner = model.model.language_model, model.model
        projections = [
            part
            for layer in decoder.cross
            for attention in [decoder.cross_attention(layer)]
            for part in (attention.k_proj, attention.v_proj)
        ]
        projected = sum(map(_bytes, projections))
        read = _bytes(decoder) + _bytes(model.lm_head) - _bytes(decoder.embed_tokens) - projected
        count = sum(map(_numbers, (decoder, model.lm_head)))
        count -= _numbers(decoder.embed_tokens) + sum(map(_numbers, projections))
        sizes, cache = engine.cache.sizes, engine.cache
        vector = 2 * sizes.kv_heads * sizes.head_dim * sizes.item
        return cls(
            weights=read,
            flop=2 * count,
            frame_weights=_bytes(inner) - _bytes(decoder) + projected,
            frame_flop=encode + 2 * sum(map(_numbers, projections)) * cache.patches,
            text=sizes.own * vector,
            frame=sizes.cross * vector * cache.patches,
        )


def _bytes(module: torch.nn.Module) -> int:
    kept = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.itemsize for tensor in kept)


def _numbers(module: torch.nn.Module) -> int:
    """The number of weights in matrix products, quantized ones included."""
    kinds = QuantizedLinear, Fp8Linear
    quantized = [part for part in module.modules() if isinstance(part, kinds)]
    full = [tensor for tensor in module.parameters() if tensor.ndim == 2]
    return sum(part.in_features * part.out_features for part in quantized) + sum(
        tensor.numel() for tensor in full
    )


@torch.inference_mode()
def encoding_flop(model: MossVideoForConditionalGeneration) -> int:
    """FLOPs of encoding a frame in tower and projector, counted while one is encoded."""
    pixels = random_frames(model, 1)[:, None]
    ones = torch.ones(1, dtype=torch.long, device=pixels.device)
    with FlopCounterMode(display=False) as counter:
        model.model.encode(pixels, ones, ones[:, None].bool())
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Floor:
    """The least seconds that a machine could need for a model."""

    machine: Machine
    work: Work
    text: int  # cached tokens of a session
    frames: int  # cached frames of a session

    def step(self, sessions: int = 1, tokens: int = 1) -> float:
        """Seconds of a decoder pass with `tokens` new tokens of each session."""
        work = self.work
        kept = sessions * (self.text * work.text + self.frames * work.frame)
        return self.machine.seconds(work.weights + kept, sessions * tokens * work.flop)

    def vision(self, frames: int = 1) -> float:
        """Seconds of encoding and projecting frames."""
        return self.machine.seconds(self.work.frame_weights, frames * self.work.frame_flop)

    def decision(self) -> float:
        """Seconds from a frame to its decision: a pass with the pending token and the frame's."""
        return self.vision() + self.step(tokens=2)

    def first_token(self, frames: int, tokens: int) -> float:
        """Seconds to the first token of an answer to a whole video and a question at once."""
        return self.vision(frames) + self.step(tokens=frames + tokens)
