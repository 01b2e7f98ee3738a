"""What the kernels are compared in on a device, before they are used there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_pipeline.proof import Case
from inference.hf.decoder_moss_video import Rotation
from inference.kernels.rows import Attention, Rows

NEVER = 2**40  # a position that no token reaches


@dataclass(frozen=True)
class Sizes:
    """Of a decoder, as far as the kernels depend on them; of one rank's slice."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    patches: int


@dataclass
class _Small:
    """Buffers of three slots and one layer of each kind, half full."""

    tokens_of: dict[int, Tensor]
    frames_of: dict[int, Tensor]
    first: Tensor
    last: Tensor
    patches: int


class Cases:
    """Cases of each operation in a decoder's sizes, by the name that `Kernels` gives it."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes):
        self.device, self.dtype, self.sizes = device, dtype, sizes
        self.generator = torch.Generator().manual_seed(0)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def _numbers(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def add_norm(self, ours: Any, other: Any) -> Iterator[Case]:
        for scaled in (False, True):
            x, branch = self._random(3, self.sizes.hidden), self._random(3, self.sizes.hidden)
            weight = self._random(self.sizes.hidden)
            scale = self._random(3) if scaled else None

            yield _case(partial(_sum_and_norm, x, branch, scale, weight), ours, other)

    def swiglu(self, ours: Any, other: Any) -> Iterator[Case]:
        gate_up = self._random(3, 2 * self.sizes.inner)
        yield lambda: ours(gate_up), lambda: other(gate_up)

    def _rotation(self, tokens: int) -> Rotation:
        angles = torch.rand(tokens, self.sizes.head_dim // 2, generator=self.generator)
        angles = torch.cat((angles, angles), -1).to(self.device)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _rows(self, count: int) -> Rows:
        length, position = self._numbers([130, 40]), self._numbers([400, 60])
        return Rows(self._numbers([2, 0]), length, position, count)

    def _buffers(self) -> _Small:
        sizes, places, window = self.sizes, 300, 4

        def kept(length: int) -> Tensor:
            return self._random(2, 3, sizes.kv_heads, length, sizes.head_dim)

        first = [[5, 9, 20, 61, NEVER], [NEVER] * 5, [3, 300, 350, 401, NEVER]]
        last = [[NEVER, NEVER, 61, NEVER, NEVER], [NEVER] * 5, [401, *[NEVER] * 4]]
        frames = kept((window + 1) * sizes.patches)
        return _Small(
            {0: kept(places)}, {1: frames}, self._numbers(first), self._numbers(last), sizes.patches
        )

    def rotate_and_keep(self, ours: Any, other: Any) -> Iterator[Case]:
        for count in (1, 3):
            rows, rotation = self._rows(count), self._rotation(2 * count)
            heads = self.sizes.heads + 2 * self.sizes.kv_heads
            qkv = self._random(2 * count, heads * self.sizes.head_dim)
            kept = self._buffers().tokens_of[0]

            yield _case(partial(_rotated_and_kept, qkv, rotation, kept, rows), ours, other)

    def norm_and_rotate(self, ours: Any, other: Any) -> Iterator[Case]:
        q = self._random(3, self.sizes.heads * self.sizes.head_dim)
        weight = self._random(self.sizes.head_dim)
        for rotation in (None, self._rotation(3)):
            yield _case(partial(_call, (q, weight, 1e-5, rotation)), ours, other)

    def product8(self, ours: Any, other: Any) -> Iterator[Case]:
        shape = (self.sizes.inner, self.sizes.hidden)
        weight = torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8)
        scale = self._random(self.sizes.inner).abs() / 127
        for tokens in (1, 2, 20):
            x = self._random(tokens, self.sizes.hidden)
            yield _case(partial(_call, (x, weight.to(self.device), scale)), ours, other)

    def attention(self, ours: Any, other: Any) -> Iterator[Case]:
        buffers = self._buffers()
        for count in (1, 2, 33):
            rows = self._rows(count)
            q = self._random(2 * count, self.sizes.heads, self.sizes.head_dim)
            yield _case(partial(_attended, buffers, rows, q), ours, other)


def _case(compute: Callable[[Any], Tensor], ours: Any, other: Any) -> Case:
    return partial(compute, ours), partial(compute, other)


def _call(arguments: tuple[Any, ...], function: Callable[..., Tensor]) -> Tensor:
    return function(*arguments)


def _sum_and_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, add_norm: Callable[..., Tensor]
) -> Tensor:
    changed = x.clone()
    return torch.cat([add_norm(changed, branch, scale, weight, 1e-5), changed])


def _rotated_and_kept(
    qkv: Tensor, rotation: Rotation, kept: Tensor, rows: Rows, keep: Callable[..., Tensor]
) -> Tensor:
    keys, values = kept.clone()
    q = keep(qkv, rotation, keys, values, rows)
    return torch.cat([q.flatten(), keys.flatten(), values.flatten()])


def _attended(
    buffers: Any, rows: Rows, q: Tensor, attention: Callable[[Any, Rows], Attention]
) -> Tensor:
    attended = attention(buffers, rows)
    return torch.cat([attended.tokens(0, q), attended.frames(1, q)])
