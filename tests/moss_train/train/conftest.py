"""Overrides of small jobs, and how their tests start them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.torchrun import Result, run_ranks


@pytest.fixture(scope="session")
def small(toy: Path) -> list[str]:
    """Overrides of a job of eight steps of a few tenths of a second."""
    return [
        "stage=pt2", "model=toy", "data=toy", "hardware=cpu", "hardware.threads=1",
        f"data.root={toy}", "data.global_batch=4", "data.micro_batch=2", "data.workers=2",
        "data.shuffle_window=10", "data.audit=true", "stage.video_max_frames=8",
        "stage.mixture={text: 20, image: 40, video: 40}",
        "model.text.num_layers=4", "model.text.cross_attention_layers=[1,3]",
        "optimizer.lr=1e-3", "trainer.steps=8",
    ]  # fmt: skip


Jobs = Callable[..., Result]


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """run_jobs(ranks, {"name": ..., "overrides": [...]}, ...): all in one start of torchrun."""

    def run(ranks: int, *tasks: dict[str, Any]) -> Result:
        out = tmp_path_factory.mktemp("jobs")
        (out / "tasks.json").write_text(json.dumps(tasks))
        worker = "tests/workers/job.py"
        return run_ranks(worker, ranks, str(out / "tasks.json"), out=out, timeout=300)

    return run
