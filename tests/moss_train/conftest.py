"""A toy data set for the tests of moss_train."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.toy.build import ToyConfig, build_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples a source, in shards of 8: a run of ten steps passes over it more than once."""
    out = tmp_path_factory.mktemp("toy")
    build_toy(out, ToyConfig(train=24, heldout=1, seed=3, samples_per_shard=8))
    return out
