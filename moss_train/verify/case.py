"""Inputs in Hugging Face's form, to compare what two implementations make of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.batch import IGNORED_LABEL
from data_pipeline.commands import one_line

NEEDED = ("input_ids", "pixel_values", "aspect_ratio_ids", "cross_attention_mask")


class VerificationError(ValueError):
    """Something that cannot be compared; the text names it and says what to do."""


@dataclass
class Case:
    """A batch in HF's form, and what is known of it.

    tokens, labels, attention_mask `[B, S]`, padded on the right; labels are not shifted.
    pixels `[B, F, T, 3, h, w]`, normalized; ratio_ids `[B, F]`, 0 for a padding frame.
    positions: index of each frame's `<|image|>` `[B, F]`.
    mask: 1 where a token may see a tile `[B, S, F, T]`.
    silence_id, silence_weight: what the label of silence weighs.
    expected: what someone else made of it, by name.
    """

    tokens: Tensor
    labels: Tensor
    attention_mask: Tensor
    pixels: Tensor
    ratio_ids: Tensor
    positions: Tensor
    mask: Tensor
    silence_weight: float
    expected: dict[str, Tensor] = field(default_factory=dict)
    silence_id: int = -1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row without padding."""
        return self.attention_mask.sum(1).tolist()


@dataclass
class ForwardJob:
    """The job of forward.py's ranks. `greedy`: number of tokens to generate after the first row."""

    checkpoint: str
    case: str
    out: str
    parallel: dict[str, Any]
    dtype: str  # fp32 | bf16
    device: str
    image_id: int
    silence_id: int
    silence_weight: float
    greedy: int


def read_case(path: Path, image_id: int, silence_id: int, silence_weight: float) -> Case:
    """A safetensors file with `NEEDED`, and maybe `attention_mask`, `labels`, `logits`, `loss`,
    `greedy`, `vision_position_ids`.

    Raises:
        VerificationError: it cannot be read, or lacks a tensor.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path}: cannot be read: {one_line(error)}") from None
    missing = [name for name in NEEDED if name not in tensors]
    if missing:
        raise VerificationError(f"{path}: has no {', '.join(missing)}")
    tokens, ratios = tensors["input_ids"], tensors["aspect_ratio_ids"]
    positions = tensors.get("vision_position_ids")
    if positions is None:
        positions = image_token_positions(tokens, image_id, ratios.shape[1])
    ones = torch.ones_like(tokens)
    return Case(
        tokens,
        tensors.get("labels", torch.full_like(tokens, IGNORED_LABEL)),
        tensors.get("attention_mask", ones),
        tensors["pixel_values"],
        ratios,
        positions,
        tensors["cross_attention_mask"],
        silence_weight,
        tensors,
        silence_id,
    )


def image_token_positions(tokens: Tensor, image_id: int, count: int) -> Tensor:
    """Index of the `<|image|>` of each of `count` frames of a row; 0 where there are fewer."""
    out = tokens.new_zeros(len(tokens), count)
    for row, where in enumerate(tokens == image_id):
        positions = where.nonzero()[:count, 0]
        out[row, : len(positions)] = positions
    return out


def make_case(
    image_id: int,
    vocabulary: int,
    image_size: int,
    max_tiles: int,
    silence_id: int,
    silence_weight: float,
    seed: int = 0,
) -> Case:
    """Two rows of unequal length with two frames and one, text before, between and after; the
    first frame has two tiles where the model knows more than one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, min(vocabulary, image_id), (2, 24), generator=generator)
    attention = torch.ones(2, 24, dtype=torch.long)
    attention[1, 17:] = 0
    places = [[3, 12], [6]]
    count = min(2, max_tiles)
    pixels = torch.zeros(2, 2, count, 3, image_size, image_size)
    ratios = torch.tensor([[count, 1], [1, 0]])  # [1, 1] has id 1, [1, 2] id 2
    mask = torch.zeros(2, 24, 2, count, dtype=torch.long)
    for row, where in enumerate(places):
        tokens[row, where] = image_id
        for frame, place in enumerate(where):
            tiles = int(ratios[row, frame])
            shape = (tiles, 3, image_size, image_size)
            pixels[row, frame, :tiles] = torch.randn(shape, generator=generator)
            mask[row, place:, frame, :tiles] = 1
    labels = tokens.masked_fill((tokens == image_id) | (attention == 0), IGNORED_LABEL)
    if silence_id >= 0:
        tokens[0, 20] = labels[0, 20] = silence_id
    positions = image_token_positions(tokens, image_id, 2)
    return Case(
        tokens, labels, attention, pixels, ratios, positions, mask, silence_weight,
        silence_id=silence_id,
    )  # fmt: skip
