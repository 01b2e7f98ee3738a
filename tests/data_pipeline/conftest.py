"""A small toy set, built once, and the real files where they exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.toy.build import ToyConfig, build_toy

REAL_FILES = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 8 held-out samples a source, in shards of 10."""
    out = tmp_path_factory.mktemp("toy")
    build_toy(out, ToyConfig(train=48, heldout=8, seed=1, samples_per_shard=10, stages=("sft",)))
    return out


@pytest.fixture(scope="session")
def real_files() -> Path:
    if not REAL_FILES.is_dir():
        pytest.skip(f"{REAL_FILES} is not there")
    return REAL_FILES
