"""A job whose loader processes could hand over no batch is refused, or warned, with a line."""

from __future__ import annotations

import math
import re
import shutil
from typing import NamedTuple

import pytest

from moss_train.compose import load_config
from moss_train.config import ConfigError
from moss_train.train import shared_memory


class Usage(NamedTuple):
    total: int


@pytest.mark.parametrize(
    ("ranks", "options", "bytes_"),
    [
        # 64 frames of 560 x 560 RGB pixels for each of 4 workers of each of 8 replicas.
        ("8", ["stage=pt1"], 8 * 4 * 64 * 3 * 560 * 560),
        ("8", ["stage=pt1", "parallel=tp2"], 4 * 4 * 64 * 3 * 560 * 560),
        ("1", ["stage=pt1", "data.max_tiles=4"], 4 * 64 * 4 * 3 * 560 * 560),
        ("1", ["stage=pt1", "stage.mixture={text: 1, image: 1, video: 0}"], 4 * 3 * 560 * 560),
        ("1", ["stage=realtime_sft", "data.workers=0"], 0),
    ],
)
def test_each_loader_process_has_room_for_a_sample(monkeypatch, caplog, ranks, options, bytes_):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.setattr(shared_memory, "PLACE", shared_memory.Path("/"))
    config = load_config(
        overrides=["model=11b", "data=shards", "data.tokenizer=x", "run.dir=x", *options]
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(bytes_))
    shared_memory.check_shared_memory(config)
    assert not caplog.messages
    if bytes_ == 0:
        return
    advice = rf"data.workers=4: .*docker run --shm-size={math.ceil(2 * bytes_ / 1e9)}g"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(bytes_ - 1))
    shared_memory.check_shared_memory(config)  # few samples are as long
    assert re.match(advice, caplog.messages[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(bytes_ // 4 - 1))
    with pytest.raises(ConfigError, match=advice):
        shared_memory.check_shared_memory(config)
