"""How much memory an engine's graphs will take: counted from shapes, before one is captured.

Graphs that share a pool run one after the other, so that the pool is as large as the largest of
them needs: what a pass holds at its peak. What the driver keeps of each graph (a few hundred
launches) is not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from data_pipeline import devices
from inference.engine.cache_sizes import CacheSizes, gib
from inference.engine.graphs import HEAD, Shapes
from inference.engine.quantized_linear import QuantizedLinear
from inference.engine.tower_graphs import BATCHES
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.hf.vision_moss_video import PATCH_MULTIPLE, VisionLayer
from inference.kernels.choose import Kernels
from inference.kernels.rows import PassSize
from inference.kernels.trials import Sizes

# Bytes that the sampling which takes most (Draw.CUT) holds at its peak for a logit: copies of it in
# fp32, sorted and not, their tokens, and the hash in 64 bits that draws.
DRAWN = 57
TOKEN = 8  # for each token of the vocabulary, whatever the slots
WORKSPACE = 32 << 20  # of cuBLAS for each stream, as torch asks for it on an H100; elsewhere 8 MiB
STREAMS = 3  # that multiply: one on which graphs are captured, and a warm-up's of each pool


@dataclass(frozen=True)
class GraphMemory:
    """Bytes that an engine's graphs take on one rank.

    passes: of the pool that decoding passes share with the sampling after them.
    tower: of the vision tower's pool.
    buffers: what graphs read from and write to.
    workspaces: cuBLAS's.
    """

    passes: int
    tower: int
    buffers: int
    workspaces: int = STREAMS * WORKSPACE

    @classmethod
    def of(
        cls,
        model: MossVideoForConditionalGeneration,
        sizes: Sizes,
        cache: CacheSizes,
        slots: int,
        kernels: Kernels,
    ) -> GraphMemory:
        """The memory of a model's engine with so many slots, whose passes are made of `kernels`."""
        shapes = Shapes.of(slots, kernels.any_rows)
        item = model.model.language_model.embed_tokens.weight.itemsize
        words = model.config.text_config.vocab_size
        most = max(_pass_bytes(sizes, cache, kernels, item, *kind) for kind in shapes.kinds)
        drawn = words * (slots * max(DRAWN, item * _copies_of_logits(model)) + TOKEN)
        side = model.config.vision_config.image_size
        pixels = BATCHES[-1] * 3 * side**2 * 4
        return cls(
            passes=max(most, drawn) + item * _full_weights(model, sizes, kernels),
            tower=_tower_bytes(model, sizes, item),
            buffers=slots * (8 * (HEAD + shapes.counts[-1]) + words * item) + pixels,
        )

    @property
    def total(self) -> int:
        """Bytes that are taken for good."""
        return self.passes + self.tower + self.buffers + self.workspaces

    @property
    def peak(self) -> int:
        """Bytes at most while graphs are captured: a pass runs before, without a graph and outside
        the pool."""
        return self.total + max(self.passes, self.tower)

    @contextmanager
    def reported(self, device: torch.device) -> Iterator[None]:
        """Says before a capture how much is expected, and afterwards how much was taken."""
        parts = {"passes": self.passes, "vision": self.tower, "buffers": self.buffers,
                 "cuBLAS": self.workspaces}  # fmt: skip
        each = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
        _print(f"CUDA graphs will take about {gib(self.total)} ({each})")
        before = _free(device)
        yield
        used = before - _free(device)
        _print(f"CUDA graphs have taken {gib(max(0, used))}, {gib(self.total)} were expected")


def _print(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _free(device: torch.device) -> int:
    devices.release_memory(device)  # what is left of a capture's first runs
    return devices.free_memory(device)


def _pass_bytes(
    sizes: Sizes, cache: CacheSizes, kernels: Kernels, item: int, count: int, rows: int
) -> int:
    """What a pass holds at its peak: attention in a layer, or its MLP (decode.py)."""
    tokens = rows * count
    hidden, heads = sizes.hidden * item, sizes.heads * sizes.head_dim * item
    vectors = 2 * sizes.kv_heads * sizes.head_dim * item  # a token's keys and values
    size = PassSize(
        rows=rows, count=count, heads=sizes.heads, kv_heads=sizes.kv_heads, width=sizes.head_dim,
        places=max(cache.text_length, cache.frames_length), item=item, eight_bit=sizes.eight_bit,
    )  # fmt: skip
    # Queries, keys and values in one; queries alone; what they see, and saw in the layer before.
    attention = tokens * (4 * heads + vectors) + kernels.attention.scratch(size)
    # The normed input; queries and what they saw, until the next layer; gates and the rest, both
    # as they are, multiplied, and what plain torch makes on the way.
    mlp = tokens * (hidden + 2 * heads + 4 * sizes.inner * item)
    # The sum, the branch that is to be added to it, cosines and sines.
    return tokens * 2 * (hidden + sizes.head_dim * item) + max(attention, mlp)


def _copies_of_logits(model: MossVideoForConditionalGeneration) -> int:
    """How often a pass holds its logits: several ranks gather their parts, and join them."""
    return 1 if isinstance(model.lm_head, torch.nn.Linear | QuantizedLinear) else 3


def _full_weights(model: MossVideoForConditionalGeneration, sizes: Sizes, kernels: Kernels) -> int:
    """Numbers of the largest quantized layer, where plain torch converts it for a product."""
    layers = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
    own = Kernels()
    copies = [
        (4 if layer.four_bits else 1) * layer.out_features * layer.in_features
        for layer in layers
        if layer.product_of(kernels) is layer.product_of(own)
    ]
    joined = 2 * sizes.inner * sizes.hidden if copies else 0
    return max([joined, *copies])


def _tower_bytes(model: MossVideoForConditionalGeneration, sizes: Sizes, item: int) -> int:
    """Bytes of the tower's pool: the largest batch of frames in a layer's MLP, and the features of
    all batches."""
    vision, config = model.config.vision_config, model.config
    tower = model.model.vision_model
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    padded = -(-patches // PATCH_MULTIPLE) * PATCH_MULTIPLE
    state = padded * vision.hidden_size * item
    first = cast(VisionLayer, tower.transformer.layers[0])  # of a rank
    inner = padded * first.mlp.fc1.out_features * item
    kept = len(tower.intermediate)  # states that are pooled at the end
    # A layer's input, and the sum, the branch and the norm behind attention; the MLP before and
    # after its activation function.
    layer = (kept + 4) * state + 2 * inner
    # All states; side by side where they are pooled together, which takes them all once more.
    alone = config.pool_mode not in ("none", "channel_fusion")
    joined = (kept + 1) * state * (2 if alone else 4)
    features = sizes.patches * sizes.hidden * item
    return BATCHES[-1] * max(layer, joined) + sum(BATCHES) * features
