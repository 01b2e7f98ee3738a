"""The rows of a static pass, and the buffers that they read and write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """B rows of S new tokens: N = B x S tokens, those of a row one after the other.

    slot: of each row `[B]`; None: row i is slot i.
    length: cached tokens of each row before the pass `[B]`; the new ones are written behind them.
    position: of each row's first new token `[B]`.
    count: S.
    """

    slot: Tensor | None
    length: Tensor
    position: Tensor
    count: int

    @property
    def places(self) -> Tensor:
        """Where the new tokens' keys and values go in a slot's buffers, `[B, S]`."""
        return self.length[:, None] + torch.arange(self.count, device=self.length.device)

    @property
    def positions(self) -> Tensor:
        """Positions of the new tokens in their streams, `[B, S]`."""
        return self.position[:, None] + torch.arange(self.count, device=self.position.device)

    def slots(self, count: int) -> Tensor:
        """The slot of each row `[B]`, of `count` slots."""
        device = self.length.device
        return torch.arange(count, device=device) if self.slot is None else self.slot

    def of(self, buffer: Tensor) -> Tensor:
        """The rows of a buffer that has one row a slot."""
        return buffer if self.slot is None else buffer[self.slot]


class Buffers(Protocol):
    """Keys and values of all slots (inference.engine.cache.KVCache).

    tokens_of, frames_of: by layer `[2, slots, KV heads, L, D]`, keys and values.
    first, last: a token at position t sees the frame in place i if first[i] <= t < last[i]
        `[slots, window + 1]`.
    patches: places of a frame in `frames_of`.
    scales_of: by layer `[2, KV heads]`, where keys and values are in 8 bits: by which powers of two
        they were divided.
    """

    tokens_of: dict[int, Tensor]
    frames_of: dict[int, Tensor]
    first: Tensor
    last: Tensor
    patches: int
    scales_of: dict[int, Tensor]


def seen_frames(buffers: Buffers, rows: Rows) -> Tensor:
    """True where a new token sees the frame in a place `[B, S, window + 1]`."""
    at = rows.positions[..., None]
    return (rows.of(buffers.first)[:, None] <= at) & (at < rows.of(buffers.last)[:, None])


@dataclass(frozen=True)
class PassSize:
    """What the memory of a pass depends on: its rows, `count` new tokens in each; heads of `width`
    numbers of `item` bytes; places of keys that a slot has at most, in 8 bits or not."""

    rows: int
    count: int
    heads: int
    kv_heads: int
    width: int
    places: int
    item: int
    eight_bit: bool


class Attention(Protocol):
    """What the new tokens of one pass attend.

    any_rows: reads the slots of its rows where they are in the cache; else they would be copied.
    sees: whether a token sees any frame `[B, S]`.
    """

    any_rows: ClassVar[bool]
    sees: Tensor

    def __init__(self, buffers: Any, rows: Rows): ...

    @staticmethod
    def scratch(size: PassSize) -> int:
        """Bytes that it holds at its peak, beside queries and what they see."""

    def tokens(self, layer: int, q: Tensor) -> Tensor:
        """What queries `[N, heads, D]` see of all tokens up to their own `[N, heads x D]`."""

    def frames(self, layer: int, q: Tensor) -> Tensor:
        """What queries `[N, heads, D]` see of the frames `[N, heads x D]`; 0 without a frame."""
