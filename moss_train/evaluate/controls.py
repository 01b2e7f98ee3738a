"""What a model is shown of a sample: its frames, or a control in place of them."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data_pipeline.batch import EncodedSample
from data_pipeline.encode import SampleEncoder
from moss_train.data_config import CONTROLS
from moss_train.evaluate.items import Item
from moss_train.transfer import to_device

ALL_FRAMES = ""  # all frames, in their order
# None; the middle one in place of each; all, in another order.
BLIND, ONE_FRAME, SHUFFLED = CONTROLS


@dataclass(frozen=True)
class ModelInput:
    """A sequence of tokens, and its frames.

    positions: indexes of its `<|image|>` tokens, none where it is blind. states `[F, T x P, H]`,
    ratios `[F]`: its frames in that order, of which there may be more: the later ones stay unseen.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    states: Tensor
    ratios: Tensor


class Model(Protocol):
    """What is evaluated. replica.py, model.py and exported.py have such models."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def encoder(self) -> SampleEncoder: ...

    def encode(self, samples: Sequence[EncodedSample]) -> list[Tensor]:
        """Projected frames of each sample `[F, T x P, H]`, on the device."""

    def next_tokens(self, inputs: Sequence[ModelInput]) -> list[int]:
        """The most likely token after each sequence."""

    def predict(self, inputs: Sequence[ModelInput]) -> list[tuple[Tensor, Tensor]]:
        """For each sequence the most likely token `[S]` after each of its tokens, and the log
        probability of each of its tokens `[S]` (that of the first is 0). On the host."""


@dataclass(frozen=True)
class ShownSample:
    """A sample, and the frames that the model is shown at its `<|image|>` tokens.

    states: `[F, T x P, H]`. ratios: `[F]`, on the host. blind: none of them.
    """

    item: Item
    states: Tensor
    ratios: Tensor
    blind: bool = False

    def under(self, control: str) -> ShownSample:
        """The same sample with what `control` shows; itself where that is the same."""
        if control == BLIND and len(self.states):
            return replace(self, blind=True)
        if control not in (ONE_FRAME, SHUFFLED) or len(self.states) < 2:
            return self
        order = torch.tensor(frame_order(len(self.states), self.item.key, control))
        (there,) = to_device([order])
        return replace(self, states=self.states.index_select(0, there), ratios=self.ratios[order])


def watch(model: Model, items: Sequence[Item]) -> list[ShownSample]:
    """The samples with their frames, encoded."""
    states = model.encode([item.encoded for item in items])
    return [
        ShownSample(item, state, item.encoded.aspect_ratio_ids)
        for item, state in zip(items, states, strict=True)
    ]


def frame_order(count: int, key: str, control: str) -> list[int]:
    """Which frame is shown in place of each of `count`, two or more. The order of `shuffled` is
    another one than theirs, and the same whenever a sample is called so, wherever it lies."""
    if control == ONE_FRAME:
        return [count // 2] * count
    order = list(range(count))
    draw = random.Random(zlib.crc32(key.rpartition("/")[2].encode()))
    while order == sorted(order):
        draw.shuffle(order)
    return order
