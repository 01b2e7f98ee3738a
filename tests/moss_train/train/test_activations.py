"""The memory that is predicted for a step is what a step takes on a simulated GPU.

Its tensors are counted while real steps run (tests/live_memory.py), in bf16.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.torchrun import run_ranks

SINGLE: dict[str, dict[str, Any]] = {
    "all": {"train": ["*"], "vocabulary": 8192},
    "selective": {"train": ["*"], "recompute": "selective"},
    "projector": {"train": ["projector.*"]},
    "tower": {"train": ["*"], "recompute": "full", "frames_per_chunk": 48},
    "kept": {"train": ["*"], "frames_per_chunk": 8, "kept_frames": 38},
}
PAIRS: dict[str, dict[str, Any]] = {
    "tensor": {"train": ["*"], "tensor": 2, "sequence": True, "recompute": "selective"},
    "pipeline": {"train": ["decoder.*"], "pipeline": 2, "micro": 1},
    "shared_tower": {
        "train": ["*"],
        "tensor": 2,
        "vision_tensor": True,
        "recompute": "selective",
        "frames_per_chunk": 48,
    },
    "kept_pipeline": {
        "train": ["*"],
        "pipeline": 2,
        "micro": 1,
        "recompute": "selective",
        "frames_per_chunk": 8,
        "kept_frames": 16,
    },
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What every rank of each run took, and what was predicted."""
    out = tmp_path_factory.mktemp("memory")
    found: dict[str, list[dict[str, Any]]] = {}
    for ranks, runs in ((1, SINGLE), (2, PAIRS)):
        told = json.dumps(list(runs.items()))
        result = run_ranks("tests/workers/live_memory.py", ranks, told, out=out / str(ranks))
        found |= {name: result.load_all(name) for name in runs}
    return found


@pytest.mark.parametrize("name", SINGLE | PAIRS)
def test_a_step_takes_what_is_predicted(seen, name: str) -> None:
    """What stays between steps, and what a step needs beside it on the rank that needs most."""
    predicted = seen[name][0]["predicted"]
    step = predicted["frames"] + predicted["activations"]
    rest = sum(predicted.values()) - step
    assert rest == pytest.approx(max(rank["rest"] for rank in seen[name]), rel=0.03)
    needed = max(rank["peak"] - rank["rest"] for rank in seen[name])
    assert step == pytest.approx(needed, rel=0.1)
