"""What a job needs of each rank's memory at least: seen before anything is built."""

from __future__ import annotations

import math
import os
from fnmatch import fnmatchcase

import psutil

from data_pipeline.ranks import ranks_of
from moss_train import hardware
from moss_train.config import Config, ConfigError
from moss_train.model.hf_mapping import our_shape, table
from moss_train.train.chunk_size import MOMENTS, kept_by_frame

GRADIENT = 4  # bytes a trained parameter, in fp32
MAIN = 4  # the fp32 copy of weights in bf16; shared by the data-parallel ranks, as the moments are


def check_fits(config: Config) -> None:
    """Refuses a job of which a rank has not the memory for weights, gradients and optimizer. What
    activations need beside them is not known before.

    Raises:
        ConfigError: names what is needed, what is there, and what to change.
    """
    needed = least_bytes(config, ranks_of().size)
    name, there = _memory(config.hardware.device)
    if sum(needed.values()) <= there:
        return
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in needed.items() if size)
    layout = config.parallel
    raise ConfigError([
        f"each rank needs at least {sum(needed.values()) / 1e9:.1f} GB ({parts}), {name} has "
        f"{there / 1e9:.1f}: more ranks with a larger parallel.tensor ({layout.tensor}) or "
        f"parallel.pipeline ({layout.pipeline}), more data-parallel ranks, which share the "
        "optimizer, a smaller model, or fewer parts in stage.train"
    ])  # fmt: skip


def least_bytes(config: Config, ranks: int) -> dict[str, int]:
    """Bytes of one of `ranks` ranks, by what they are for: the mean of a pipeline's stages.

    With the activations of one frame where the tower trains. Adapters (`adapter`) are left out.
    """
    layout, model = config.parallel, config.model
    weight = hardware.DTYPES[model.dtype].itemsize
    optimizer = MOMENTS + (MAIN if model.dtype == "bf16" else 0)
    sums = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0, "activations of a frame": 0.0}
    for rule in table(model):
        decoder = rule.ours.startswith("decoder.")
        slices = layout.tensor if decoder or layout.vision_tensor else 1
        stages = layout.pipeline if decoder else 1
        count = math.prod(our_shape(model, rule)) / stages
        count /= slices if rule.split is not None else 1
        sums["weights"] += weight * count
        if not _trains(config, rule.ours):
            continue
        sums["gradients"] += GRADIENT * count
        sums["optimizer"] += optimizer * count / (ranks // (slices * stages))
        if rule.ours.startswith("vision"):
            sums["activations of a frame"] = kept_by_frame(config) / slices
    return {part: round(size) for part, size in sums.items()}


def _trains(config: Config, name: str) -> bool:
    adapted = config.adapter.name != "none" and name.startswith("decoder.")
    patterns = [*config.stage.train, *config.stage.also]
    return not adapted and any(fnmatchcase(name, pattern) for pattern in patterns)


def _memory(kind: str) -> tuple[str, int]:
    """What this rank computes on, and the bytes that it has."""
    if kind != "cpu" and hardware.has_accelerator():
        return hardware.device_name(), hardware.total_memory()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return f"this machine's share for one of {here} ranks", psutil.virtual_memory().total // here
