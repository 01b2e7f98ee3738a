"""Steps that would harm the weights are left out, on all ranks alike; after several, back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moss_train.train.guard import Guard
from tests.moss_train.train.runs import audit, metrics, saved_steps


def bad_steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]


def hidden(run: Path) -> list[str]:
    """What is beside the checkpoints: damaged ones, and half-written ones."""
    return sorted(path.name for path in (run / "checkpoints").glob(".*"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("guarded")


@pytest.fixture(scope="module")
def outcomes(small, run_jobs, runs):
    """Two ranks; what is wrong is wrong on the second one only."""

    def task(name: str, poison: dict[int, str], *overrides: str, **more: Any) -> dict[str, Any]:
        run = f"run.dir={runs / name}"
        return {"name": name, "overrides": [*small, *overrides, run], "poison": poison, **more}

    saving = ["trainer.checkpoint_every=3", "trainer.max_skipped_steps=2"]
    return run_jobs(
        2,
        task("skips", {4: "loss", 6: "gradient"}, "parallel=dp2", *saving),
        task("returns", {5: "loss", 6: "gradient"}, "parallel=dp2", *saving),
        task("stops", {5: "loss", 6: "gradient"}, "parallel=dp2", *saving, stop_after=6),
        task(
            "damaged",
            {7: "file", 8: "loss", 9: "loss"},
            "parallel=dp2",
            *saving,
            "trainer.steps=10",
        ),
        task("drifts", {5: "weights"}, "parallel=dp2", "trainer.compare_replicas_every=1"),
        task(
            "circles", dict.fromkeys((5, 6, 8, 9, 11, 12, 14, 15), "loss"), "parallel=dp2", *saving
        ),
        task("hopeless", dict.fromkeys(range(5, 99), "loss"), "parallel=pp2", *saving),
    )


def test_a_bad_step_is_left_out_and_counted(outcomes, runs):
    run = runs / "skips"
    assert outcomes.load("skips")["error"] is None
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [step == 4 for step in range(1, 9)]
    assert set(outcomes.load("skips")["adam_steps"]) == {6}
    assert all(w.isfinite().all() for w in outcomes.load("skips")["weights"].values())
    # 6 was due for a checkpoint, but its weights had just failed: 7 got it.
    assert saved_steps(run) == [7, 8]
    found = bad_steps(run)
    assert [(row["step"], row["reason"]) for row in found] == [
        (4, "the loss is not finite"),
        (6, "the gradient is not finite"),
    ]
    keys = audit(run)
    assert [sorted(row["keys"]) for row in found] == [keys[4], keys[6]]
    assert found[1]["loss"] > 0
    assert found[0]["loss"] is None


def test_after_several_the_run_goes_back_and_on_with_other_data(outcomes, runs):
    run = runs / "returns"
    assert outcomes.load("returns")["error"] is None
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 2, 2, 2, 2, 2]
    assert set(outcomes.load("returns")["adam_steps"]) == {8}
    assert [row["step"] for row in bad_steps(run)] == [5, 6]
    # Up to the checkpoint after step 3 the runs are the same, and so is the data that follows it.
    same = metrics(runs / "skips")
    assert [row["loss"] for row in rows[:3]] == [row["loss"] for row in same[:3]]
    keys, straight = audit(run), audit(runs / "skips")
    assert keys[3] == straight[3]
    assert keys[4] == straight[7]
    assert keys[5] == straight[8]
    # What it went back to is whole, and not written again.
    assert saved_steps(run) == [6, 8]
    assert hidden(run) == []


def test_a_run_that_is_stopped_where_it_goes_back_keeps_that_checkpoint(outcomes, runs):
    assert outcomes.load("stops")["error"] is None
    assert saved_steps(runs / "stops") == [3]
    assert hidden(runs / "stops") == []
    assert [row["step"] for row in metrics(runs / "stops")] == [1, 2, 3]


def test_going_back_to_one_checkpoint_again_and_again_ends_the_job(outcomes, runs):
    """Each time a step is done, and the next ones fail: a rate that destroys the weights."""
    checkpoint = f"{runs}/circles/checkpoints/step_00000003"
    assert outcomes.load("circles")["error"] == (
        "RuntimeError: step 6: 2 steps in a row were left out, the last since the loss is not "
        f"finite, and {checkpoint} did not help: lower optimizer.lr, or look at the samples that "
        f"{runs}/circles/bad_steps.jsonl names"
    )
    assert outcomes.stderr().count(f"back to {checkpoint} after 2 steps left out") == 3
    assert saved_steps(runs / "circles") == [3]


def test_it_does_not_go_back_to_a_damaged_checkpoint(outcomes, runs):
    run = runs / "damaged"
    assert outcomes.load("damaged")["error"] is None
    said = outcomes.stderr()
    newest, before = (run / "checkpoints" / f"step_{step:08d}" for step in (6, 3))
    assert f"WARNING checkpoint {newest} is damaged: " in said
    assert f"WARNING back to {before} after 2 steps left out; on with other data" in said
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert saved_steps(run)[-1] == 10
    assert hidden(run) == [".damaged_step_00000006"]
    assert set(outcomes.load("damaged")["adam_steps"]) == {10}


def test_ranks_that_hold_other_weights_than_their_replicas_end_the_job(outcomes, runs):
    assert outcomes.load("drifts")["error"] == (
        "RuntimeError: step 5: ranks that should hold the same weights differ in "
        "['projector.linear.weight']: go on from the last checkpoint, and report this as a bug"
    )
    assert saved_steps(runs / "drifts") == []


def test_going_back_in_vain_ends_the_job(outcomes, runs):
    assert outcomes.load("hopeless")["error"] == (
        "RuntimeError: step 5: 2 steps in a row were left out, the last since the loss is not "
        f"finite, and {runs}/hopeless/checkpoints/step_00000003 did not help: lower optimizer.lr, "
        f"or look at the samples that {runs}/hopeless/bad_steps.jsonl names"
    )
    assert saved_steps(runs / "hopeless") == [3]


def test_there_is_no_spike_before_there_is_a_median():
    guard = Guard(3.0, [1.0] * 8, skipped=0)

    def step(loss: float, norm: float = 1.0) -> str | None:
        numbers = (torch.tensor(x, dtype=torch.float64) for x in (loss, norm))
        return guard.record(int(guard.verdict(*numbers)), loss)

    assert step(9.0) is None
    assert step(1.0) is None
    assert step(2.9) is None
    assert step(3.1) == "the loss is a spike"
    assert step(3.1, torch.inf) == "the gradient is not finite"
    assert (guard.skipped, guard.in_a_row) == (2, 2)
    assert step(1.0) is None
    assert (guard.skipped, guard.in_a_row) == (2, 0)
