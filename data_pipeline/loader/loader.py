"""Endless, mixed, shuffled, exactly resumable microbatches from folders of shards.

The training process decides which samples a microbatch has (order.py). The loader processes of
torch's DataLoader read and encode them in turns, and keep nothing that would have to be saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from data_pipeline.batch import MicroBatch
from data_pipeline.encode import EncodeConfig, SampleEncoder
from data_pipeline.loader.order import Order, Part, turns
from data_pipeline.loader.reader import SourceReader
from data_pipeline.loader.remote import AnyShards
from data_pipeline.loader.samples import Samples
from data_pipeline.loader.shuffle import SourceOrder
from data_pipeline.loader.state import OrderState, Source, go_on, start
from data_pipeline.loader.worker import init_worker
from data_pipeline.shards import training_shards
from data_pipeline.stores import StoreOptions, is_url
from data_pipeline.tokens import load_tokenizer

_END_S = 10.0  # seconds that a worker process may take to end once it has been asked twice


class Loader:
    """The part of one data-parallel rank of all global batches. Build it with `build_loader`."""

    def __init__(
        self, samples: Samples, order: Order, part: Part, workers: int, read_ahead: int
    ) -> None:
        self._order, self._part = order, part
        pinned = torch.accelerator.is_available()  # else it warns
        self._copies = workers > 0 and not pinned  # page-locked ones are copies, too
        self._inner: DataLoader[MicroBatch] | None = DataLoader(
            samples,
            batch_sampler=_Endless(order, part, max(1, workers), read_ahead),
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pinned,
            worker_init_fn=partial(init_worker, os.getpid()),
            generator=torch.Generator(),  # else it would draw a number of the run's
            # Python 3.14 would have them forked by a server, which a signal to all processes ends.
            multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
        )
        self._iterator: Iterator[MicroBatch] | None = None
        self._reading: Any = None  # torch's iterator, once it is asked for

    def __iter__(self) -> Iterator[MicroBatch]:
        """The only iterator of this loader, endless; a second call returns the same one."""
        if self._iterator is None:
            self._iterator = self._batches()
        return self._iterator

    def _batches(self) -> Iterator[MicroBatch]:
        self._reading = iter(() if self._inner is None else self._inner)
        for batch in self._reading:
            yield batch.copied() if self._copies else batch

    @property
    def processes(self) -> list[BaseProcess]:
        """The worker processes: none before the first batch is asked for, or with `workers=0`."""
        return list(getattr(self._reading, "_workers", ()))

    def state(self, steps: int) -> OrderState:
        """Where the run stands `steps` global batches after its start; the same on all ranks."""
        return self._order.after(steps * self._part.global_batch)

    def close(self) -> None:
        """Ends the worker processes, closes shards. The loader cannot be used afterwards."""
        if workers := self.processes:
            self._reading._shutdown_workers()  # waits a while, then sends a signal and goes on
            for worker in workers:
                worker.join(_END_S)
                worker.kill()  # nothing where it has ended
                worker.join()
        self._iterator, self._reading, self._inner = iter(()), None, None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Endless:
    """The microbatches of a rank as DataLoader asks for them."""

    def __init__(self, order: Order, part: Part, processes: int, ahead: int) -> None:
        self._order, self._part, self._processes, self._ahead = order, part, processes, ahead

    def __iter__(self) -> Iterator[Any]:
        return turns(self._order.batches(self._part), self._processes, self._ahead)


def _as_it_is(batch: Any) -> Any:
    return batch


def build_loader(
    sources: Sequence[Source],
    encode: EncodeConfig,
    part: Part,
    *,
    workers: int,
    seed: int,
    shuffle_window: int,
    state: Mapping[str, Any] | None = None,
    stores: StoreOptions | None = None,
) -> Loader:
    """Builds the loader of one data-parallel rank; no collective is called.

    `workers` processes read for this rank (0: this process reads). `shuffle_window` samples of a
    source are mixed with each other; 0 reads the shards in order. Sources with weight 0 are left
    out. `state`: an OrderState's `to_dict`; what is still the same goes on from there. `stores`:
    how sources that are URLs are read. Raises ValueError for a wrong argument, source or tokenizer.
    """
    used = [source for source in sources if source.weight > 0]
    _check(used, sources, part, workers)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning after forks
    shards = {source.name: training_shards(source.path) for source in used}
    begin = start(used, shards, seed, shuffle_window)
    if state is not None:
        begin = go_on(OrderState.from_dict(state), begin)
    stores, paths = stores or StoreOptions(), {source.name: source.path for source in used}
    opened = AnyShards(stores)
    readers = [SourceReader(name, paths[name], shards[name], opened) for name in begin.sources]
    orders = [SourceOrder(one.name, one.counts, seed, shuffle_window) for one in readers]
    samples = Samples(readers, SampleEncoder(encode, load_tokenizer(encode.tokenizer)), seed)
    ahead = stores.read_ahead if any(map(is_url, paths.values())) else 0
    return Loader(samples, Order(orders, begin), part, workers, ahead)


def _check(used: list[Source], sources: Sequence[Source], part: Part, workers: int) -> None:
    for source in sources:
        if not source.weight >= 0:
            raise ValueError(f"source {source.name}: weight: {source.weight}: must be >= 0")
    if not used:
        raise ValueError("sources: none with a weight above 0")
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"sources: the names must differ: {', '.join(names)}")
    if part.micro_batch < 1:
        raise ValueError(f"micro_batch: {part.micro_batch}: must be at least 1")
    if not 0 <= part.rank < part.size:
        raise ValueError(f"data-parallel rank: {part.rank}: must be in 0..{part.size - 1}")
    if part.global_batch < 1 or part.global_batch % (part.micro_batch * part.size):
        raise ValueError(
            f"global_batch: {part.global_batch}: must be a multiple of {part.micro_batch} x "
            f"{part.size}"
        )
    if workers < 0:
        raise ValueError(f"workers: {workers}: must be at least 0")
