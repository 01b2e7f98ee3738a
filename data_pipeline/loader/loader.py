"""Endless, mixed, shuffled, exactly resumable microbatches from folders of shards.

It is built on energon. A job reads `streams = data_parallel_size * max(1, workers)` independent
streams; stream `rank * max(1, workers) + k` is read by worker k of a data-parallel rank, and its
samples depend on its number alone. So the saved states of all streams, one entry each, can be given
to another number of ranks and workers, as long as the number of streams stays the same.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.energon import (
    SavableDataLoader,
    SavableDataset,
    WorkerConfig,
    get_savable_loader,
)
from megatron.energon.epathlib import EPath
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)

from data_pipeline.batch import MicroBatch
from data_pipeline.encode import EncodeConfig, SampleEncoder
from data_pipeline.loader.mixture import shuffle_and_mix
from data_pipeline.loader.reader import ShardSource
from data_pipeline.loader.state import StreamState
from data_pipeline.loader.task import ShardTask
from data_pipeline.loader.worker import init_worker
from data_pipeline.shards import check_source
from data_pipeline.tokens import load_tokenizer

# How many pieces of shards a worker reads in turns, and how many samples a piece has. Together with
# the shuffle buffer they decide how well samples are mixed.
_OPEN_PIECES = 8
_PIECE_SAMPLES = 100


@dataclass(frozen=True)
class Source:
    """A folder of indexed shards. `weight`: its share of the samples, relative to other sources."""

    name: str
    path: str
    modality: Literal["text", "image", "video"]
    weight: float


class Loader:
    """The streams of one data-parallel rank, read in turns. Build it with `build_loader`."""

    def __init__(
        self, dataset: SavableDataset[MicroBatch], config: WorkerConfig, identity: str
    ) -> None:
        self._config = config
        self._identity = identity
        self._streams = max(1, config.num_workers)
        self._begun = [
            StreamState(identity, config.rank * self._streams + k, 0, None)
            for k in range(self._streams)
        ]  # where each stream starts
        self._inner: SavableDataLoader[MicroBatch] = get_savable_loader(
            dataset,
            # A checkpoint after every batch: the state of a stream then never needs batches
            # replayed, and fits a loader with any number of workers.
            checkpoint_every_sec=0,
            checkpoint_every_min_n_samples=1,
            # energon would collect garbage every ten batches, for up to 0.15 s in a process with
            # this project's imports. Samples hold no cycles: Python frees their tensors at once.
            gc_collect_every_n_steps=0,
        )
        # energon always asks for pinned memory, which warns where there is no accelerator.
        self._inner.pin_memory = torch.accelerator.is_available()
        starting = partial(init_worker, os.getpid(), self._inner.worker_init_fn)
        self._inner.worker_init_fn = starting
        self._iterator: Iterator[MicroBatch] | None = None

    def __iter__(self) -> Iterator[MicroBatch]:
        """The only iterator of this loader, endless; a second call returns the same one."""
        if self._iterator is None:
            self._iterator = self._batches()
        return self._iterator

    def _batches(self) -> Iterator[MicroBatch]:
        batches = iter(self._inner)
        # The first garbage collection of a worker would copy each memory page that has a Python
        # object of this process. Objects that were frozen before the worker started are left alone.
        gc.freeze()
        try:
            first = next(batches)
        finally:
            gc.unfreeze()
        yield first
        yield from batches

    def state(self) -> list[bytes]:
        """One entry for each stream of this rank: its position after the batches taken so far."""
        self._check_alive()
        saved = self._inner.save_state_rank()
        return [self._entry(k, saved).to_bytes() for k in range(self._streams)]

    def load_state(self, states: Sequence[bytes]) -> None:
        """Continues from this rank's entries; only before the first batch is taken.

        For another number of ranks, the entries of all ranks in a row are cut into equal parts.
        Raises ValueError where they belong to other streams, sources or shuffling.
        """
        if self._iterator is not None:
            raise ValueError("load_state: the loader has already been read from")
        if len(states) != self._streams:
            raise ValueError(
                f"load_state: {len(states)} entries, but this rank has {self._streams} streams"
            )
        entries = [StreamState.from_bytes(state) for state in states]
        for k, entry in enumerate(entries):
            entry.check(self._identity, self._config.rank * self._streams + k)
        if all(entry.batches == 0 for entry in entries):
            return
        self._begun = entries
        self._restore(entries)

    def close(self) -> None:
        """Ends the worker processes. The loader cannot be used afterwards."""
        workers = getattr(self._inner, "_iterator", None)
        if workers is not None:
            workers._shutdown_workers()
        for queue in (*self._inner.cmd_queues, *self._inner.result_queues):
            queue.cancel_join_thread()
            queue.close()
        self._iterator = iter(())

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, k: int, saved: SavableDataLoaderState | None) -> StreamState:
        stream = self._config.rank * self._streams + k
        if saved is None:
            return self._begun[k]
        worker = saved.worker_states[k]
        if self._config.num_workers == 0:
            return StreamState(
                self._identity, stream, worker["_sample_index"], worker["datasets"][0]
            )
        if worker.state is None:  # the worker is starting: none of its batches has been taken
            return self._begun[k]
        if worker.offset:
            raise RuntimeError(f"stream {stream}: energon kept no state for the last batch taken")
        return StreamState(
            self._identity, stream, worker.state.sample_index, worker.state.dataset_state
        )

    def _restore(self, entries: list[StreamState]) -> None:
        worker_states: list[Any]
        if self._config.num_workers == 0:
            wrapper = self._inner.dataset.save_state()
            wrapper["_sample_index"] = entries[0].batches
            wrapper["datasets"] = [entries[0].dataset]
            worker_states = [wrapper]
        else:
            worker_states = [
                SavableDatasetCheckpoint(
                    state=SavableDatasetState(
                        rng=None, dataset_state=entry.dataset, sample_index=entry.batches
                    ),
                    offset=0,
                )
                for entry in entries
            ]
        counts = [entry.batches for entry in entries]
        self._inner.restore_state_rank(
            SavableDataLoaderState(
                worker_states=worker_states,
                # Streams are read in turns, so the next one is the first that is behind.
                next_worker_id=counts.index(min(counts)),
                micro_batch_size=self._inner._get_batch_size(),
            )
        )

    def _check_alive(self) -> None:
        """Raises RuntimeError for a dead worker: energon would wait for its answer for ever."""
        running = getattr(self._inner, "_iterator", None)
        for k, worker in enumerate(running._workers if running is not None else ()):
            if not worker.is_alive():
                raise RuntimeError(f"data worker {k} has died with exit code {worker.exitcode}")


def build_loader(
    sources: Sequence[Source],
    encode: EncodeConfig,
    *,
    micro_batch: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    workers: int,
    seed: int,
    shuffle_buffer: int,
) -> Loader:
    """Builds the loader of one data-parallel rank; no collective is called.

    `workers` processes read for this rank (0: in this process, one stream). `shuffle_buffer`
    samples are held by each stream to draw from; 0 reads the shards in order. Sources with
    weight 0 are left out. Raises ValueError for a wrong argument, source or tokenizer.
    """
    used = [source for source in sources if source.weight > 0]
    _check(used, sources, micro_batch, data_parallel_rank, data_parallel_size, workers)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning after forks
    config = WorkerConfig(
        rank=data_parallel_rank,
        world_size=data_parallel_size,
        num_workers=workers,
        seed_offset=seed,
    )
    streams = data_parallel_size * max(1, workers)
    counts = {source.name: check_source(source.path).samples for source in used}
    task = ShardTask(SampleEncoder(encode, load_tokenizer(encode.tokenizer)), seed)
    dataset = task.build_train_datasets(
        datasets=[_load(source, config, streams, shuffle_buffer) for source in used],
        worker_config=config,
        batch_size=micro_batch,
        blend_mode=DatasetBlendMode.DATASET_WEIGHT,
    )
    shuffle_and_mix(dataset, shuffle_buffer)
    identity = f"{streams} streams, shuffle_buffer {shuffle_buffer}, samples {counts}"
    return Loader(dataset, config, identity)


def _load(source: Source, config: WorkerConfig, streams: int, shuffle_buffer: int) -> LoadedDataset:
    shuffling: dict[str, Any] = {"shuffle_over_epochs": None, "parallel_shard_iters": 1}
    if shuffle_buffer:
        shuffling = {
            "shuffle_over_epochs": 1,
            "parallel_shard_iters": _OPEN_PIECES,
            "max_samples_per_sequence": _PIECE_SAMPLES,
        }
    factory = ShardSource(
        EPath(os.path.abspath(source.path)),
        split_part="train",
        training=True,
        worker_config=config,
        subflavors={"source": source.name},
        decoder=None,
        **shuffling,
    )
    # energon splits the samples over the streams and leaves a stream without any out of the blend,
    # which would change the mixture: a source with fewer samples than streams is listed repeatedly.
    factory.shards = factory.shards * -(-streams // len(factory))
    return LoadedDataset(dataset=factory, weight=source.weight)


def _check(
    used: list[Source],
    sources: Sequence[Source],
    micro_batch: int,
    rank: int,
    size: int,
    workers: int,
) -> None:
    for source in sources:
        if not source.weight >= 0:
            raise ValueError(f"source {source.name}: weight: {source.weight}: must be >= 0")
    if not used:
        raise ValueError("sources: none with a weight above 0")
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"sources: the names must differ: {', '.join(names)}")
    if micro_batch < 1:
        raise ValueError(f"micro_batch: {micro_batch}: must be at least 1")
    if not 0 <= rank < size:
        raise ValueError(f"data_parallel_rank: {rank}: must be in 0..{size - 1}")
    if workers < 0:
        raise ValueError(f"workers: {workers}: must be at least 0")
