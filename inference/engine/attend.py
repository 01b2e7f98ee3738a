"""The attention of passes over any number of tokens, and of the vision tower: what its kinds have
in common, and torch's (attend_flash.py, attend_npu.py: others; choose_attend.py: which).

Passes of fixed shape attend by the operation of kernels/choose.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inference.engine.upload import upload
from inference.hf.decoder_moss_video import attend
from inference.hf.vision_moss_video import VisionAttention, attend_patches
from inference.kernels import plain
from inference.kernels.rows import Attention


class Attend(Protocol):
    """One kind of attention. A slot's keys and values are `[1, KV heads, places, D]`, of which the
    first `length` are attended by queries `[1, heads, S, D]`; the result has the queries' shape.

    `text` and `frames` make what is the same in all layers of a pass; `__call__` takes it.
    """

    @property
    def fixed(self) -> type[Attention]:
        """The operation of passes of fixed shape where no kernel of Triton's is used."""

    def text(self, count: int, length: int, device: torch.device) -> Any:
        """`count` new tokens, the last of `length`: each sees the tokens up to itself."""

    def frames(
        self, visible: Tensor | None, patches: int, places: int, device: torch.device
    ) -> Any:
        """Which token sees which frame: bool `[S, frames]` on the host, in each row one at least;
        None: all see all. A frame is `patches` places, and a slot has `places` in all."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, length: int, plan: Any) -> Tensor:
        """The attention of the queries, by what `text` or `frames` has planned."""

    def tower(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """All patches of a frame see each other: `[N, L, heads, D]` each; mask: True where they do
        `[N, 1, L, L]`."""


class Sdpa:
    """`Attend` by torch's scaled_dot_product_attention."""

    fixed = plain.Attention

    def text(self, count: int, length: int, device: torch.device) -> tuple[Tensor | None, bool]:
        if count == 1 or count == length:
            return None, count > 1
        key = torch.arange(length, device=device)
        return (key <= key[length - count :, None])[None, None], False

    def frames(
        self, visible: Tensor | None, patches: int, places: int, device: torch.device
    ) -> tuple[Tensor | None, bool]:
        return None if visible is None else frame_mask(visible, patches, device), False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, length: int, plan: tuple[Tensor | None, bool]
    ) -> Tensor:
        return attend(q, k[:, :, :length], v[:, :, :length], *plan)

    def tower(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend_patches(q, k, v, mask)


def frame_mask(visible: Tensor, patches: int, device: torch.device) -> Tensor:
    """True where a token sees a place `[1, 1, S, frames x patches]`."""
    return upload(visible, device).repeat_interleave(patches, dim=1)[None, None]


def attend_by(model: nn.Module, kind: Attend) -> None:
    """Makes the layers of a model's vision tower attend by this kind."""
    for module in model.modules():
        if isinstance(module, VisionAttention):
            module.attend = kind.tower


def runs(values: Tensor) -> list[tuple[int, int]]:
    """Where neighbours of `[n]`, or rows of `[n, m]`, are equal: [start, stop) of each run."""
    differs = values[1:] != values[:-1]
    changes = (differs if values.dim() == 1 else differs.any(1)).nonzero()[:, 0] + 1
    return list(pairwise([0, *changes.tolist(), len(values)]))
