"""The least time that a machine could need: what it must read at the speed of its memory, or
compute at the speed of its products, whichever is longer.

A pass reads every weight of the decoder once, and the keys and values that it attends. The speeds
are those that this machine shows here, not those of a data sheet.
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

COPIED = {True: 1 << 30, False: 64 << 20}  # bytes that are copied, on an accelerator or a CPU
SQUARE = {True: 8192, False: 1024}  # rows of the product that is timed
TIMES = 5


@dataclass(frozen=True)
class Machine:
    """What a device reaches: bytes/s of a copy (read and written), FLOP/s of a product."""

    bytes_per_s: float
    flop_per_s: float

    @classmethod
    def measured(cls, device: torch.device, dtype: torch.dtype, clock: Clock) -> Machine:
        """Some tenths of a second of copying and multiplying; medians."""
        fast = devices.is_accelerator(device)
        source = torch.zeros(COPIED[fast], dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        side = SQUARE[fast]
        a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        copy = _seconds(lambda: target.copy_(source), clock)
        product = _seconds(lambda: torch.mm(a, b), clock)
        return cls(2 * COPIED[fast] / copy, 2 * side**3 / product)

    def seconds(self, bytes: float, flop: float) -> float:
        """Reading and computing at the same time."""
        return max(bytes / self.bytes_per_s, flop / self.flop_per_s)


def _seconds(work: Callable[[], Tensor], clock: Clock) -> float:
    work()
    seconds = []
    for _ in range(TIMES):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds)


@dataclass(frozen=True)
class Work:
    """What parts of a model read and compute.

    Attributes:
        weights: bytes that a pass of the decoder reads: all of it but the embeddings and the
            projections of frames.
        flop: of a token in the decoder, its weights alone.
        frame_weights, frame_flop: of a frame in the tower, the projector and the projections of
            all cross-attention layers.
        text, frame: bytes of keys and values of a cached token and of a cached frame.
    """

    weights: int
    flop: int
    frame_weights: int
    frame_flop: int
    text: int
    frame: int

    @classmethod
    def of(cls, model: MossVideoForConditionalGeneration, engine: Engine, encode: int) -> Work:
        """Counts parameters as they are kept (8-bit weights are a byte each, with their scales).

        encode: `encoding_flop` of the model.
        """
        decoder, inner = model.model.language_model, model.model
        frames = [
            part
            for layer in decoder.cross
            for attention in [decoder.cross_attention(layer)]
            for part in (attention.k_proj, attention.v_proj)
        ]
        projected = sum(map(_bytes, frames))
        read = _bytes(decoder) + _bytes(model.lm_head) - _bytes(decoder.embed_tokens) - projected
        count = sum(map(_numbers, (decoder, model.lm_head)))
        count -= _numbers(decoder.embed_tokens) + sum(map(_numbers, frames))
        sizes, cache = engine.cache.sizes, engine.cache
        vector = 2 * sizes.kv_heads * sizes.head_dim * sizes.item
        return cls(
            weights=read,
            flop=2 * count,
            frame_weights=_bytes(inner) - _bytes(decoder) + projected,
            frame_flop=encode + 2 * sum(map(_numbers, frames)) * cache.patches,
            text=sizes.own * vector,
            frame=sizes.cross * vector * cache.patches,
        )


def _bytes(module: torch.nn.Module) -> int:
    kept = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.itemsize for tensor in kept)


def _numbers(module: torch.nn.Module) -> int:
    """Weights of products, those that are quantized as well."""
    kinds = QuantizedLinear, Fp8Linear
    quantized = [part for part in module.modules() if isinstance(part, kinds)]
    full = [tensor for tensor in module.parameters() if tensor.ndim == 2]
    return sum(part.in_features * part.out_features for part in quantized) + sum(
        tensor.numel() for tensor in full
    )


@torch.inference_mode()
def encoding_flop(model: MossVideoForConditionalGeneration) -> int:
    """FLOPs of encoding a frame in the tower and the projector: one is encoded, and counted."""
    pixels = random_frames(model, 1)[:, None]
    ones = torch.ones(1, dtype=torch.long, device=pixels.device)
    with FlopCounterMode(display=False) as counter:
        model.model.encode(pixels, ones, ones[:, None].bool())
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Floor:
    """The least seconds of what is measured, on a machine, for a model.

    text, frames: cached tokens and frames of a session.
    """

    machine: Machine
    work: Work
    text: int
    frames: int

    def step(self, sessions: int = 1, tokens: int = 1) -> float:
        """A pass with `tokens` of each session."""
        work = self.work
        kept = sessions * (self.text * work.text + self.frames * work.frame)
        return self.machine.seconds(work.weights + kept, sessions * tokens * work.flop)

    def vision(self, frames: int = 1) -> float:
        """The tower, the projector and the projections for cross-attention."""
        return self.machine.seconds(self.work.frame_weights, frames * self.work.frame_flop)

    def decision(self) -> float:
        """A frame in, `<|silence|>` or a word out: the pending token and the frame's."""
        return self.vision() + self.step(tokens=2)

    def first_token(self, frames: int, tokens: int) -> float:
        """A whole video and a question at once."""
        return self.vision(frames) + self.step(tokens=frames + tokens)
