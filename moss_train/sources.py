"""Which folders of shards a run reads, with which shares, and whether a checkpoint's order of data
goes on with them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from data_pipeline.loader.state import OrderState, Source, differences, start
from data_pipeline.shards import training_shards
from data_pipeline.stores import is_url
from moss_train.config import Config


def mixed_sources(config: Config) -> list[Source]:
    """The sources with their share of all samples: the modality's, divided by their weights."""
    shares = config.stage.mixture.shares
    selected = [source for source in config.data.sources if source.modality in shares]
    sums = dict.fromkeys(shares, 0.0)
    for source in selected:
        sums[source.modality] += source.weight
    return [
        Source(
            name=source.name,
            path=source.path,
            modality=cast(Any, source.modality),  # validated
            weight=shares[source.modality] * source.weight / sums[source.modality],
        )
        for source in selected
    ]


def unread_sources(config: Config) -> list[str]:
    """Names of the sources whose modality has no share of the run's samples."""
    return [s.name for s in config.data.sources if s.modality not in config.stage.mixture.shares]


def shared_sources(config: Config) -> list[str]:
    """A line for each source that validates, and is trained on, too."""
    if config.trainer.eval_every is None:
        return []
    trained = {_place(source.path): source.name for source in mixed_sources(config)}
    return [
        f"data.eval_sources[{source.name}].path={source.path}: the run also trains on it, as "
        f"data.sources[{name}]: its loss is not that of unseen samples"
        for source in config.data.eval_sources
        if (name := trained.get(_place(source.path))) is not None
    ]


def _place(path: str) -> str:
    """The one spelling of a folder or URL for all paths that lead there."""
    return path.rstrip("/") if is_url(path) else os.path.realpath(path)


def order_changes(config: Config, saved: Mapping[str, Any]) -> list[str]:
    """What this run reads otherwise than the run whose `run.json` is `saved`, a line each."""
    if saved.get("data_order") is None:
        return ["it was saved by an earlier version, in an order that cannot go on"]
    sources = mixed_sources(config)
    shards = {source.name: training_shards(source.path) for source in sources}
    now = start(sources, shards, config.trainer.seed, config.data.shuffle_window)
    return list(differences(OrderState.from_dict(saved["data_order"]), now))
