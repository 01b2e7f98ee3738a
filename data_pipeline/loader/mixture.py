"""The order in which a stream takes samples from its sources: shuffled, in the asked mixture.

energon draws the source of each sample at random and shuffles what comes, which leaves shares that
are off by half a percent over 10,000 samples in one run of five. Here each source is shuffled by
itself and drawn evenly: by the fractional parts of `start + n x golden ratio`, the sequence that
fills [0, 1) most evenly: after n draws a share is within about log(n) / n of what was asked.
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
    """A random generator whose choices are evenly spread; it starts at a random point."""

    drawn = 0
    start: float | None = None  # known in the worker, whose stream it depends on

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
    """energon's, saved in a fraction of the time: the loader saves its state with every batch.

    A buffer's state are the restore keys of what it holds, tuples of words and numbers; energon
    copies them deeply, 8 ms for 1,000 samples.
    """

    def reset_state_own(self) -> None:
        self._worker_rng = _Rng(self.worker_config)
        self._active_buffer = _Buffer(self.dataset, worker_config=self.worker_config)


def shuffle_and_mix(dataset: SavableDataset[Any], buffer: int) -> None:
    """Puts shuffle buffers and an even blend into a training dataset of energon.

    energon builds its own blend, deep inside a chain of wrappers, and takes no other. `buffer`
    samples are held, of each source in proportion to its weight; 0: in the order of the shards.
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
