"""The cross-attention as one FlexAttention call, for long videos on a GPU.

One kernel in place of one a block of frame_plan.py. Which (128 queries, 128 keys) it computes is
planned on the host, once for a microbatch, from the frames that each token attends: no dense mask
is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from data_pipeline.devices import is_accelerator

BLOCK = 128  # queries and keys


class _Picked:
    """The columns that each row of a matrix picks, as FlexAttention takes them.

    counts: how many, int32 `[1, 1, rows]`. columns: these first, in order, then the others
        `[1, 1, rows, columns]`.
    """

    on_device: ClassVar = ("counts", "columns")

    def __init__(self, picked: Tensor):
        """picked: bool `[rows, columns]`."""
        self.counts = picked.sum(1, dtype=torch.int32)[None, None]
        order = picked.byte().argsort(dim=1, descending=True, stable=True)
        self.columns = order.to(torch.int32)[None, None]


class FlexPlan:
    """What n tokens attend of F frames of T tiles of P vision tokens.

    first, last: frames of each token `[n]`. free: 1 where it also attends tiles that are not real,
        else 0 `[n]`. frame_of: of each key. unreal: 1 for keys of a tile that is not real, else 0.
        All int32, and the only things that a kernel has to know: FlashAttention-4 takes no numbers.
    partly, wholly: blocks of keys of each block of queries, which are attended in part, or by all
        queries; and the same by keys, for the backward pass.
    """

    on_device: ClassVar = (
        "first", "last", "free", "frame_of", "unreal", "partly", "wholly", "partly_by_keys",
        "wholly_by_keys",
    )  # fmt: skip

    def __init__(self, first: Tensor, last: Tensor, free: Tensor, real: Tensor, patches: int):
        """real: `[F, T]`. patches: P."""
        self.frame = patches * real.shape[1]  # keys
        self.sizes = len(first), len(real) * self.frame
        self.first, self.last, self.free = (x.int() for x in (first, last, free))
        self.frame_of = torch.arange(self.sizes[1], dtype=torch.int32) // self.frame
        self.unreal = (~real).int().flatten().repeat_interleave(patches)
        partly, wholly = self._blocks()
        self.partly, self.wholly = _Picked(partly), _Picked(wholly)
        self.partly_by_keys, self.wholly_by_keys = _Picked(partly.T), _Picked(wholly.T)
        blocks = int(partly.sum() + wholly.sum())
        self.pairs = -(-blocks * BLOCK * BLOCK // self.frame)  # (token, frame), computed

    def _blocks(self) -> tuple[Tensor, Tensor]:
        """Blocks that are attended in part, or as a whole: bool `[blocks of n, of all keys]`.

        One that may be attended in part may as well not be at all: the mask says so.
        """
        tokens, keys = self.sizes
        more = -tokens % BLOCK
        begin, end, free = (
            torch.cat((x, x[-1:].expand(more))).view(-1, BLOCK)
            for x in (self.first * self.frame, self.last * self.frame, self.free > 0)
        )
        start = torch.arange(0, keys, BLOCK)
        stop = start + BLOCK
        tiles = pad(self.unreal == 0, (0, -keys % BLOCK)).view(-1, BLOCK)
        attended = (start < end.amax(1, keepdim=True)) & (stop > begin.amin(1, keepdim=True))
        attended &= tiles.any(1) | free.any(1, keepdim=True)
        wholly = (start >= begin.amax(1, keepdim=True)) & (stop <= end.amin(1, keepdim=True))
        wholly &= tiles.all(1) | free.all(1, keepdim=True)
        if more:
            wholly[-1] = False
        return attended & ~wholly, wholly

    @cached_property
    def block_mask(self) -> BlockMask:
        """The plan in FlexAttention's form; made once, on the device where the plan is then."""
        first, last, free = self.first, self.last, self.free
        frame_of, unreal = self.frame_of, self.unreal

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            frame = frame_of[kv]
            return (frame >= first[q]) & (frame < last[q]) & (unreal[kv] <= free[q])

        return BlockMask(
            seq_lengths=self.sizes,
            kv_num_blocks=self.partly.counts,
            kv_indices=self.partly.columns,
            full_kv_num_blocks=self.wholly.counts,
            full_kv_indices=self.wholly.columns,
            q_num_blocks=self.partly_by_keys.counts,
            q_indices=self.partly_by_keys.columns,
            full_q_num_blocks=self.wholly_by_keys.counts,
            full_q_indices=self.wholly_by_keys.columns,
            BLOCK_SIZE=(BLOCK, BLOCK),
            mask_mod=mask_mod,
        )


def plan_flex(
    first: Tensor, last: Tensor, free: Tensor, real: Tensor, patches: int
) -> FlexPlan | None:
    """The FlexPlan of these arguments; None for so few tokens or keys that a call of their own is
    as fast.

    A compiled kernel is for all sizes but 1: without this, it would be compiled for those, too.
    """
    if len(first) <= BLOCK or real.numel() * patches <= BLOCK or real.numel() == 1:
        return None
    return FlexPlan(first, last, free, real, patches)


_compiled: Callable[..., Tensor] | None = None


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, plan: FlexPlan, backend: str = "triton"
) -> Tensor:
    """Softmax attention of tokens over frames. On a CPU it is not compiled, and slow.

    Args:
        query: of the tokens that attend a frame `[n, heads, D]`.
        key, value: `[F, T x P, kv heads, D]`.
        backend: `model.flex_backend`.

    Returns:
        `[n, heads, D]`.
    """
    global _compiled
    kernel: Callable[..., Tensor] = flex_attention
    if is_accelerator(query):
        # dynamic: one kernel for all lengths. fullgraph: an error, not an eager form that keeps all
        # scores.
        _compiled = _compiled or torch.compile(flex_attention, dynamic=True, fullgraph=True)
        kernel = _compiled
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key.flatten(0, 1), value.flatten(0, 1)))
    options: Any = {} if backend == "triton" else {"kernel_options": {"BACKEND": backend.upper()}}
    out = kernel(q, k, v, block_mask=plan.block_mask, enable_gqa=True, **options)
    return out[0].transpose(0, 1)
