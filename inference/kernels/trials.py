"""The cases in which kernels are compared with plain torch on a device, before their first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_pipeline.kernel_proof import Case
from inference.kernels import plain
from inference.kernels.rows import Attention, Rows

NEVER = 2**40  # a position that no token reaches
PLACES, WINDOW = 300, 4  # tokens and frames that a slot of the trials has room for
MANY_PLACES, LONG_WINDOW = 4200, 44  # where keys are cut into as many parts as they ever are


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder that the kernels depend on; those of one rank's slice."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    patches: int
    eight_bit: bool = False  # keys and values
    fp8_weights: bool = False  # of those in 8 bits; else int8


@dataclass
class _Buffers:
    """Three slots and one layer of each kind: a ring with frames that are seen and not, an empty
    one, and one that is about to replace a frame."""

    tokens_of: dict[int, Tensor]
    frames_of: dict[int, Tensor]
    first: Tensor
    last: Tensor
    patches: int
    scales_of: dict[int, Tensor]


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
            run = partial(_rotated_and_kept, self._rows(count), self._scales())
            yield _case(f"{count} tokens", run, ours, other, (*inputs, *self._turn(2 * count)))

    def norm_and_rotate(self, ours: Any, other: Any) -> Iterator[Case]:
        width = self.sizes.head_dim
        inputs = self._draw((3, self.sizes.heads * width), (width,))
        yield _case("normed", _normed, ours, other, inputs)
        yield _case("normed and rotated", _normed, ours, other, (*inputs, *self._turn(3)))

    def product8(self, ours: Any, other: Any) -> Iterator[Case]:
        for outs, width in self._weights():
            if self.sizes.fp8_weights:
                weight = self._draw((outs, width))[0].to(plain.EIGHT_BITS)
            else:
                weight = self._integers(-127, 128, (outs, width)).to(torch.int8)
            yield from self._products(ours, other, weight, width, (outs,))

    def product4(self, ours: Any, other: Any) -> Iterator[Case]:
        for outs, width in self._weights():
            groups = -(-width // plain.GROUP)
            weight = self._integers(0, 256, (outs, groups * plain.GROUP // 2)).to(torch.uint8)
            yield from self._products(ours, other, weight, width, (outs, groups))

    def _weights(self) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs of a wide and of a long weight."""
        return (self.sizes.inner, self.sizes.hidden), (self.sizes.hidden, self.sizes.inner)

    def _products(
        self, ours: Any, other: Any, weight: Tensor, width: int, scales: tuple[int, ...]
    ) -> Iterator[Case]:
        run = partial(_product, weight)
        for tokens in (1, 2, 20, 40, 150):  # a tile of each size
            inputs = self._draw((tokens, width), scales)
            yield _case(f"{tokens} tokens of {width}", run, ours, other, inputs)

    def attention(self, ours: Any, other: Any) -> Iterator[Case]:
        sizes = self.sizes
        few, many = (PLACES, WINDOW), (MANY_PLACES, LONG_WINDOW)
        for rows, count, (places, window) in (
            (2, 1, few), (2, 2, few), (2, 8, few), (2, 33, few), (1, 1, many),
        ):  # fmt: skip
            shape = (rows * count, sizes.heads, sizes.head_dim)
            frames = self._kept((window + 1) * sizes.patches)
            inputs = self._draw(shape, self._kept(places), frames)
            run = partial(_attended, self._buffers(window), self._rows(count, rows, places))
            yield _case(f"{count} tokens of {rows} slots, {places} keys", run, ours, other, inputs)

    def _draw(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        drawn = (torch.randn(shape, generator=self.generator) for shape in shapes)
        return tuple(x.to(self.device, self.dtype) for x in drawn)

    def _integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randint(low, high, shape, generator=self.generator)
        return drawn.to(self.device)

    def _turn(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[N, D]`."""
        angles = torch.rand(tokens, self.sizes.head_dim // 2, generator=self.generator)
        angles = torch.cat((angles, angles), -1).to(self.device)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _kept(self, length: int) -> tuple[int, ...]:
        return (2, 3, self.sizes.kv_heads, length, self.sizes.head_dim)

    def _rows(self, count: int, rows: int = 2, places: int = PLACES) -> Rows:
        """`count` new tokens of each of the first `rows` slots; the first has almost half of its
        places full."""
        numbers = [2, 0], [places // 2 - 20, 40], [400, 60]
        slot, length, position = (self._whole(each[:rows]) for each in numbers)
        return Rows(slot, length, position, count)

    def _buffers(self, window: int) -> _Buffers:
        first = [[5, 9, 20, 61], [], [3, 300, 350, 401]]
        last = [[NEVER, NEVER, 61], [], [401]]
        first, last = (
            [row + [NEVER] * (window + 1 - len(row)) for row in rows] for rows in (first, last)
        )
        scales = self._scales()
        scales_of = {} if scales is None else {0: scales, 1: scales}
        views = self._whole(first), self._whole(last)
        return _Buffers({}, {}, *views, self.sizes.patches, scales_of)

    def _scales(self) -> Tensor | None:
        """Scales of keys and values `[2, KV heads]`; None: they are in the model's dtype."""
        if not self.sizes.eight_bit:
            return None
        powers = torch.arange(2 * self.sizes.kv_heads) % 5 - 6
        return torch.exp2(powers.float()).view(2, -1).to(self.device)

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
    rows: Rows,
    scales: Tensor | None,
    keep: Callable[..., Tensor],
    qkv: Tensor,
    kept: Tensor,
    *turn: Tensor,
) -> Tensor:
    each = None if scales is None else scales[:, None, :, None, None]
    buffers = plain.kept(kept, each).clone()
    q = keep(qkv, turn, *buffers, rows, scales)
    return torch.cat([q.flatten(), plain.read(buffers, each, qkv.dtype).flatten()])


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
    scales = buffers.scales_of.get(0)
    each = None if scales is None else scales[:, None, :, None, None]
    buffers.tokens_of, buffers.frames_of = (
        {layer: plain.kept(x, each)} for layer, x in enumerate((tokens, frames))
    )
    attended = attention(buffers, rows)
    return torch.cat([attended.tokens(0, q), attended.frames(1, q)])
