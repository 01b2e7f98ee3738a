"""A microbatch of packed text as the decoder takes it: sequences one after the other, unpadded.

Sequences of any length share one microbatch: each attends itself only and its positions start at 0,
so that a sequence's numbers do not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from moss_train.model.gather_rows import RowSubset
from moss_train.model.shape_grid import round_up

# A sequence is rounded up to at least so many tokens, and from there in so many steps to twice as
# many: finer than elsewhere, since attention costs the square of a length.
SHORTEST, STEPS = 64, 4
SMALL = 64 * 64  # (token, token) pairs below which attention costs its call, not its pairs


@dataclass
class PackedText:
    """T tokens of a microbatch.

    What is made of their lengths is made where the tokens are: best on the host, before `move`.

    tokens: `[T]`.
    lengths: tokens of each sequence; what is left of T after them is padding, for which the last
        sequence goes on (a causal model does not notice).
    rounded: whether batches for the attention have rounded sizes (shape_grid.py).
    """

    on_device: ClassVar = ("tokens", "positions", "bounds", "groups")

    tokens: Tensor
    lengths: list[int]
    rounded: bool = False

    @cached_property
    def spans(self) -> list[int]:
        """Tokens of each sequence, the last one with the padding."""
        rest = len(self.tokens) - sum(self.lengths)
        return [*self.lengths[:-1], self.lengths[-1] + rest]

    @cached_property
    def positions(self) -> Tensor:
        """Place of each token in its sequence `[T]`."""
        return torch.cat([torch.arange(span) for span in self.spans]).to(self.tokens.device)

    @cached_property
    def bounds(self) -> Tensor:
        """Where sequences begin, and T: int32 `[sequences + 1]`, for variable-length kernels."""
        starts = torch.tensor([0, *accumulate(self.spans)], dtype=torch.int32)
        return starts.to(self.tokens.device)

    @cached_property
    def groups(self) -> list[Group]:
        """Neighbouring sequences that are about as long, to be attended as one padded batch."""
        groups: list[list[int]] = [[]]
        for span in self.spans:
            spans = [*groups[-1], span]
            padded, needed = len(spans) * max(spans) ** 2, sum(s * s for s in spans)
            if padded <= max(1.3 * needed, SMALL):
                groups[-1] = spans
            else:
                groups.append([span])
        return [Group(spans, self.tokens.device, self.rounded) for spans in groups]


class Group:
    """Neighbouring sequences and how to pad them to `[B, S]` and back."""

    on_device = ("rows",)

    def __init__(self, spans: list[int], device: torch.device, rounded: bool = False):
        batch, longest = len(spans), max(spans)
        if rounded:
            batch, longest = round_up(batch), round_up(longest, SHORTEST, STEPS)
        self.tokens, self.shape = sum(spans), (batch, longest)
        lengths = torch.tensor(spans + [0] * (batch - len(spans)))
        real = torch.arange(longest) < lengths[:, None]  # [B, S]
        self.rows = RowSubset(real.flatten().nonzero()[:, 0].to(device), real.numel())

    def pad(self, x: Tensor) -> Tensor:
        """`[tokens, ...]` -> `[B, S, ...]`, zeros behind each sequence."""
        return self.rows.scatter(x).unflatten(0, self.shape)

    def unpad(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` -> `[tokens, ...]`."""
        return self.rows.gather(x.flatten(0, 1))
