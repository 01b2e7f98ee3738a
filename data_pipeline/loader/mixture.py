"""The order in which a stream takes samples: sources shuffled and mixed by their weights.

energon draws the source of each sample at random and shuffles the result; in one run of five the
shares are then off by half a percent over 10,000 samples. Here each source is shuffled by itself,
and sources are chosen by the fractional parts of `start + n x golden ratio`, the sequence that
fills [0, 1) most evenly: after n samples a share is within about log(n) / n of its weight.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.energon import SavableDataset
from megatron.energon.rng import WorkerRng
from megatron.energon.state import FlexState
from megatron.energon.wrappers import BlendDataset, RepeatDataset, ShuffleBufferDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer

_GOLDEN = (5**0.5 - 1) / 2


class EvenRng(WorkerRng):
    """A random generator whose choices are evenly spread; it starts at a random number."""

    drawn = 0
    start: float | None = None  # drawn in the worker, as it depends on the stream

    def choice_idx(self, probs: torch.Tensor) -> int:
        """An index, each as often as `probs` (relative) say."""
        if self.start is None:
            self.worker_config.assert_worker()
            generator = torch.Generator().manual_seed(self.worker_config.worker_seed())
            self.start = torch.rand((), dtype=torch.float64, generator=generator).item()
        place = (self.start + self.drawn * _GOLDEN) % 1.0
        self.drawn += 1
        shares = probs.double().cumsum(0)
        return int(torch.searchsorted(shares, place * shares[-1], right=True))

    def save_state(self) -> FlexState:
        return FlexState(drawn=self.drawn)

    def restore_state(self, state: FlexState) -> None:
        self.drawn = state["drawn"]


class _EvenBlend(BlendDataset):
    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._worker_rng = EvenRng(self.worker_config)


class _Rng(WorkerRng):
    def save_state(self) -> FlexState:
        return FlexState(rng=self.rng.get_state().numpy().tobytes())


class _Buffer(SavableSampleBuffer):
    def save_state(self) -> FlexState:
        state = FlexState(__class__=type(self).__name__)
        state["_restore_keys"] = list(self._restore_keys)
        return state


class _ShuffleBuffer(ShuffleBufferDataset):
    """energon's, with a state that is saved faster: the loader saves it with every batch.

    The state of a buffer is the restore keys of its samples, tuples of strings and numbers; energon
    makes deep copies of them, 8 ms for 1,000 samples.
    """

    def reset_state_own(self) -> None:
        self._worker_rng = _Rng(self.worker_config)
        self._active_buffer = _Buffer(self.dataset, worker_config=self.worker_config)


def shuffle_and_mix(dataset: SavableDataset[Any], buffer: int) -> None:
    """Puts shuffle buffers and an even blend into a training dataset of energon.

    energon builds its own blend inside a chain of wrappers, where it is replaced. `buffer`: samples
    held to draw from, of each source in proportion to its weight; 0: the order of the shards.
    """
    parent: Any = dataset
    while not isinstance(parent.dataset, BlendDataset | RepeatDataset):
        parent = parent.dataset
    inner = parent.dataset
    config = inner.worker_config
    weighted = inner.dataset_weights if isinstance(inner, BlendDataset) else [(inner, 1.0)]
    total = sum(weight for _, weight in weighted)
    if buffer:
        weighted = [
            (
                _ShuffleBuffer(source, max(1, round(buffer * w / total)), worker_config=config),
                w,
            )
            for source, w in weighted
        ]
    blend = _EvenBlend(*weighted, worker_config=config) if len(weighted) > 1 else weighted[0][0]
    parent.datasets = (blend,)
