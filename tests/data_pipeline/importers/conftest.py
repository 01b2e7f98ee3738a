"""A clip whose frames are known, in a folder of records."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_pipeline.clips import every, video


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 s at 5 frames a second: frame n is on screen from n / 5 s on."""
    return video(tmp_path_factory.mktemp("clips") / "a.mp4", every(0.2, 50))


@pytest.fixture
def folder(tmp_path: Path, clip: Path) -> Path:
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in" / "a.mp4").write_bytes(clip.read_bytes())
    return tmp_path / "in"
