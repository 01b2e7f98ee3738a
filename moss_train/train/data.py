"""The data loader of a replica, as the configuration wants it, where a checkpoint left it."""

from __future__ import annotations

from typing import Any, cast

from data_pipeline.loader import EncodeConfig, Loader, Source, build_loader
from moss_train.config import Config, ConfigError
from moss_train.parallel.groups import Groups
from moss_train.validate import mixture


def open_loader(config: Config, groups: Groups, streams: list[bytes] | None) -> Loader:
    """Opens this replica's loader (on its leader).

    Args:
        streams: state of all streams of the job that saved a checkpoint; they are dealt to this
            job's replicas, whatever their number was then. None for a new run.

    Raises:
        ConfigError: the streams cannot be dealt evenly.
    """
    size, rank = groups.data_size, groups.data_rank
    workers = config.data.workers
    if streams is not None:
        workers = loader_workers(len(streams), size, workers)
    loader = build_loader(
        mixed_sources(config),
        encode_config(config),
        micro_batch=config.data.micro_batch,
        data_parallel_rank=rank,
        data_parallel_size=size,
        workers=workers,
        seed=config.trainer.seed,
        shuffle_buffer=config.data.shuffle_buffer,
    )
    if streams is not None:
        each = len(streams) // size
        loader.load_state(streams[rank * each : (rank + 1) * each])
    return loader


def mixed_sources(config: Config) -> list[Source]:
    """The sources with their share of all samples: the modality's, divided by their weights."""
    shares = mixture(config)
    wanted = [source for source in config.data.sources if source.modality in shares]
    sums = dict.fromkeys(shares, 0.0)
    for source in wanted:
        sums[source.modality] += source.weight
    return [
        Source(
            name=source.name,
            path=source.path,
            modality=cast(Any, source.modality),  # validated
            weight=shares[source.modality] * source.weight / sums[source.modality],
        )
        for source in wanted
    ]


def encode_config(config: Config) -> EncodeConfig:
    """How samples become tensors in this run."""
    stage, data = config.stage, config.data
    return EncodeConfig(
        tokenizer=data.tokenizer,
        sequence_length=config.sequence_length,
        tile_size=config.model.vision.image_size,
        max_tiles=data.max_tiles,
        video_fps=stage.video_fps,
        video_min_frames=stage.video_min_frames,
        video_max_frames=stage.video_max_frames,
        prompt=cast(Any, stage.prompt),  # validated
    )


def loader_workers(streams: int, replicas: int, wanted: int) -> int:
    """Worker processes of each rank, so that all ranks together have `streams` streams.

    Raises:
        ConfigError: `streams` cannot be dealt evenly to `replicas` ranks.
    """
    if streams % replicas:
        raise ConfigError(
            [
                f"data-parallel size {replicas}: the checkpoint's {streams} data streams cannot be "
                f"dealt evenly: choose a layout whose data-parallel size divides {streams}"
            ]
        )
    each = streams // replicas
    return 0 if each == 1 and wanted == 0 else each
