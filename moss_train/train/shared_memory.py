"""Is /dev/shm large enough, through which loader processes hand over batches?

A container has 64 MB of it unless it is asked for more, and a loader process that finds it full is
killed by the system, without a word of why.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from data_pipeline.ranks import ranks_of_machine
from moss_train.config import Config, ConfigError
from moss_train.log import log

PLACE = Path("/dev/shm")


def check_shared_memory(config: Config) -> None:
    """Warns where this machine's loader processes cannot hand over a sample of the largest size
    each, and refuses a job of which one for each replica could not.

    Raises:
        ConfigError: names what is needed, what is there, and what to change.
    """
    workers, needed = config.data.workers, largest_samples(config)
    there = shutil.disk_usage(PLACE).total if PLACE.is_dir() else needed
    if needed <= there:
        return
    words = (
        f"data.workers={workers}: loader processes hand over batches through {PLACE}, which has "
        f"{there / 1e6:.0f} MB, and samples of {_frames(config)} frames take {needed / 1e6:.0f}: "
        f"give the container more (docker run --shm-size={math.ceil(2 * needed / 1e9)}g, or "
        "--ipc=host), or take data.workers=0, with which the job reads by itself"
    )
    if needed // workers > there:
        raise ConfigError([words])
    log.warning("%s", words)


def largest_samples(config: Config) -> int:
    """Bytes of the frames of the longest samples, one of each loader process of this machine."""
    layout, data = config.parallel, config.data
    readers = max(1, ranks_of_machine() // (layout.tensor * layout.pipeline))  # a replica has one
    frame = data.max_tiles * 3 * config.model.vision.image_size**2
    return readers * data.workers * _frames(config) * frame


def _frames(config: Config) -> int:
    return config.stage.video_max_frames if "video" in config.stage.mixture.shares else 1
