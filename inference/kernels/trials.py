"""What the kernels are compared in on a device, before they are used there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_pipeline.kernel_proof import Case
from inference.kernels.rows import Attention, Rows

NEVER = 2**40  # a position that no token reaches
PLACES, WINDOW = 300, 4  # tokens and frames that a slot of the trials has room for


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
class _Buffers:
    """Three slots and one layer of each kind: a ring with frames that are seen and not, an empty
    one, and one that is about to replace a frame."""

    tokens_of: dict[int, Tensor]
    frames_of: dict[int, Tensor]
    first: Tensor
    last: Tensor
    patches: int


class Trials:
    """Cases of each operation in a decoder's sizes, by the name that `Kernels` gives it.

    Each method takes the kernel and the same operation in plain torch.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes):
        self.device, self.dtype, self.sizes = device, dtype, sizes
        self.generator = torch.Generator().manual_seed(0)

    def add_norm(self, ours: Any, other: Any) -> Iterator[Case]:
        width = self.sizes.hidden
        inputs = self._draw((3, width), (3, width), (width,))
        yield _case("a sum", _sum_and_norm, ours, other, inputs)
        inputs = self._draw((3, width), (3, width), (width,), (3,))
        yield _case("a sum with gates", _sum_and_norm, ours, other, inputs)

    def swiglu(self, ours: Any, other: Any) -> Iterator[Case]:
        yield _case("", _call, ours, other, self._draw((3, 2 * self.sizes.inner)))

    def rotate_and_keep(self, ours: Any, other: Any) -> Iterator[Case]:
        heads, width = self.sizes.heads + 2 * self.sizes.kv_heads, self.sizes.head_dim
        for count in (1, 3):
            inputs = self._draw((2 * count, heads * width), self._kept(PLACES))
            run = partial(_rotated_and_kept, self._rows(count))
            yield _case(f"{count} tokens", run, ours, other, (*inputs, *self._turn(2 * count)))

    def norm_and_rotate(self, ours: Any, other: Any) -> Iterator[Case]:
        width = self.sizes.head_dim
        inputs = self._draw((3, self.sizes.heads * width), (width,))
        yield _case("normed", _normed, ours, other, inputs)
        yield _case("normed and rotated", _normed, ours, other, (*inputs, *self._turn(3)))

    def product8(self, ours: Any, other: Any) -> Iterator[Case]:
        shape = (self.sizes.inner, self.sizes.hidden)
        weight = torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8)
        run = partial(_product, weight.to(self.device))
        for tokens in (1, 2, 20):
            inputs = self._draw((tokens, self.sizes.hidden), (self.sizes.inner,))
            yield _case(f"{tokens} tokens", run, ours, other, inputs)

    def attention(self, ours: Any, other: Any) -> Iterator[Case]:
        frames = self._kept((WINDOW + 1) * self.sizes.patches)
        for count in (1, 2, 33):
            shape = (2 * count, self.sizes.heads, self.sizes.head_dim)
            inputs = self._draw(shape, self._kept(PLACES), frames)
            run = partial(_attended, self._buffers(), self._rows(count))
            yield _case(f"{count} tokens", run, ours, other, inputs)

    def _draw(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        drawn = (torch.randn(shape, generator=self.generator) for shape in shapes)
        return tuple(x.to(self.device, self.dtype) for x in drawn)

    def _turn(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[N, D]`."""
        angles = torch.rand(tokens, self.sizes.head_dim // 2, generator=self.generator)
        angles = torch.cat((angles, angles), -1).to(self.device)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _kept(self, length: int) -> tuple[int, ...]:
        return (2, 3, self.sizes.kv_heads, length, self.sizes.head_dim)

    def _rows(self, count: int) -> Rows:
        return Rows(self._whole([2, 0]), self._whole([130, 40]), self._whole([400, 60]), count)

    def _buffers(self) -> _Buffers:
        first = [[5, 9, 20, 61, NEVER], [NEVER] * 5, [3, 300, 350, 401, NEVER]]
        last = [[NEVER, NEVER, 61, NEVER, NEVER], [NEVER] * 5, [401, *[NEVER] * 4]]
        return _Buffers({}, {}, self._whole(first), self._whole(last), self.sizes.patches)

    def _whole(self, numbers: list[Any]) -> Tensor:
        return torch.tensor(numbers, device=self.device)


def _case(
    name: str, run: Callable[..., Tensor], ours: Any, other: Any, inputs: tuple[Tensor, ...]
) -> Case:
    return Case(name, partial(run, ours), partial(run, other), inputs, gradients=False)


def _call(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return function(*inputs)


def _sum_and_norm(
    add_norm: Callable[..., Tensor],
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    changed = x.clone()
    return torch.cat([add_norm(changed, branch, scale, weight, 1e-5), changed])


def _normed(norm: Callable[..., Tensor], q: Tensor, weight: Tensor, *turn: Tensor) -> Tensor:
    return norm(q, weight, 1e-5, turn or None)


def _rotated_and_kept(
    rows: Rows, keep: Callable[..., Tensor], qkv: Tensor, kept: Tensor, *turn: Tensor
) -> Tensor:
    keys, values = kept.clone()
    q = keep(qkv, turn, keys, values, rows)
    return torch.cat([q.flatten(), keys.flatten(), values.flatten()])


def _product(weight: Tensor, product: Callable[..., Tensor], x: Tensor, scale: Tensor) -> Tensor:
    return product(x, weight, scale)


def _attended(
    buffers: _Buffers,
    rows: Rows,
    attention: Callable[[Any, Rows], Attention],
    q: Tensor,
    tokens: Tensor,
    frames: Tensor,
) -> Tensor:
    buffers.tokens_of, buffers.frames_of = {0: tokens}, {1: frames}
    attended = attention(buffers, rows)
    return torch.cat([attended.tokens(0, q), attended.frames(1, q)])
