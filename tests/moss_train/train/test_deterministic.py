"""`trainer.deterministic=true`: two runs are equal to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.moss_train.train.runs import audit, metrics


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_runs_are_equal_to_the_bit(small, run_jobs, tmp_path, ranks):
    layout = "tp2" if ranks == 2 else "single"
    options = [*small, f"parallel={layout}", "trainer.deterministic=true", "trainer.steps=3"]
    runs = [tmp_path / "one", tmp_path / "two"]
    result = run_jobs(
        ranks, *({"name": r.name, "overrides": [*options, f"run.dir={r}"]} for r in runs)
    )
    one, two = (result.load(run.name) for run in runs)
    assert one["error"] is None
    assert one["deterministic"]
    assert not one["fills_memory"]
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in metrics(runs[0])] == [row[key] for row in metrics(runs[1])]
    assert len(metrics(runs[0])) == 3
    assert audit(runs[0]) == audit(runs[1])
    assert one["weights"].keys() == two["weights"].keys()
    for name, tensor in one["weights"].items():
        assert torch.equal(two["weights"][name], tensor), name
