"""A job that was stopped goes on as if it had not been, in the same layout and in others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.moss_train.train.runs import audit, losses, metrics, saved_steps, steps

ALL = list(range(1, 9))
# Adam divides gradients by themselves, and differences of 1e-7 in small ones with them.
STEADY = ["optimizer.eps=0.01", "trainer.steps=4"]


def task(name: str, run: Path, overrides: list[str], *more: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "overrides": [*overrides, *more, f"run.dir={run}"], **options}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(runs, small, run_jobs):
    """One process: an uninterrupted run, and others that are compared with it."""
    saving = ["trainer.checkpoint_every=2", "trainer.keep_last=9"]
    fewer = ["stage.mixture={text: 20, image: 80, video: 0}"]
    whole = runs / "whole"
    return run_jobs(
        1,
        task("whole", whole, small, *saving),
        task("same_first", runs / "same", small, stop_after=3),
        task("same_rest", runs / "same", small),
        task("slower", runs / "slower", small, "optimizer.lr=1e-12", "optimizer.beta1=0.5",
             "optimizer.lr_multipliers={vision.*: 0.5}",
             f"trainer.resume={runs / 'same'}/checkpoints/step_00000003"),
        task("chain_single", runs / "chain", small, stop_after=2),
        task("async", runs / "async", small, *saving, "trainer.async_save=true"),
        task("weights", runs / "weights", small, "trainer.steps=2", "optimizer.lr=1e-12",
             f"init_from={whole}"),
        task("ahead", whole, small, "trainer.resume=none"),
        task("back", whole, small, f"trainer.resume={whole}/checkpoints/step_00000004"),
        task("steady", runs / "steady", small, *STEADY),
        task("fewer_first", runs / "fewer", small, stop_after=3),
        task("fewer_exact", runs / "fewer", small, *fewer),
        task("fewer_fresh", runs / "fewer", small, *fewer, "trainer.resume_data=fresh",
             stop_after=5),
        task("fewer_again", runs / "fewer", small, *fewer, "trainer.resume_data=fresh"),
        task("wider", runs / "wider", small, "model.text.mlp_size=256",
             f"init_from={whole}"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(alone, runs, small, run_jobs):
    """The chain that `alone` began, in three layouts; stage pt1 on pipeline stages."""
    pt1 = [
        "stage=pt1",
        "stage.also=[]",
        "stage.mixture={text: 0, image: 60, video: 40}",
        "data.workers=1",
    ]
    return run_jobs(
        2,
        task("chain_tp2", runs / "chain", small, "parallel=tp2", stop_after=4),
        task("chain_pp2", runs / "chain", small, "parallel=pp2", stop_after=6),
        task("chain_dp2", runs / "chain", small, "parallel=dp2", "data.workers=1"),
        task("dp2", runs / "dp2", small, *STEADY, "parallel=dp2", "data.workers=3"),
        task("tp2", runs / "tp2", small, *STEADY, "parallel=tp2", "data.workers=0"),
        task("pt1_whole", runs / "pt1", small, *pt1, "parallel=pp2"),
        task("pt1_first", runs / "pt1_again", small, *pt1, "parallel=pp2", stop_after=3),
        task("pt1_rest", runs / "pt1_again", small, *pt1, "parallel=pp2"),
        task("pt1_dp2", runs / "pt1_dp2", small, *pt1, "parallel=dp2", "trainer.steps=9",
             f"trainer.resume={runs}/pt1/checkpoints/step_00000008"),
    )  # fmt: skip


def test_same_layout_resumes_bit_for_bit(alone, runs):
    assert saved_steps(runs / "same") == [3, 8]
    assert steps(runs / "same") == ALL
    assert losses(runs / "same") == losses(runs / "whole")
    rates = [row["lr"] for row in metrics(runs / "same")]
    assert rates == [row["lr"] for row in metrics(runs / "whole")]
    assert max(rates) > 2 * rates[-1]
    whole, same = alone.load("whole"), alone.load("same_rest")
    assert whole["error"] is None
    assert same["error"] is None
    assert same["adam_steps"] == whole["adam_steps"] == [8] * len(whole["adam_steps"])
    assert same["weights"].keys() == whole["weights"].keys()
    for name, tensor in whole["weights"].items():
        assert torch.equal(same["weights"][name], tensor), name


def test_what_is_changed_of_the_optimizer_takes_effect(alone, runs):
    assert alone.load("slower")["error"] is None
    before, after = alone.load("same_first")["weights"], alone.load("slower")["weights"]
    for name, tensor in before.items():
        assert torch.allclose(after[name], tensor, rtol=0, atol=1e-9), name
    assert set(alone.load("slower")["adam_steps"]) == {8}
    assert max(row["lr"] for row in metrics(runs / "slower")) <= 1e-12
    for line in ("optimizer.lr=1e-12 (was 0.001)", "optimizer.beta1=0.5 (was 0.9)"):
        assert f"changed since step 3: {line}" in alone.stderr()


def test_a_checkpoint_of_another_folder_knows_what_was_read_of_each_source(alone, runs):
    """`slower` has a folder of its own, without the steps before."""
    assert steps(runs / "slower") == ALL[3:]
    epochs = [row["epochs"] for row in metrics(runs / "slower")]
    assert epochs == [row["epochs"] for row in metrics(runs / "whole")][3:]


def test_training_changed_every_part_of_the_model(alone):
    """The comparisons of this file would hold for a job that trains nothing."""
    early, late = alone.load("same_first")["weights"], alone.load("same_rest")["weights"]
    same = [name for name in early if torch.equal(early[name], late[name])]
    assert all("tile" in name or "ratio" in name for name in same), same


def test_every_stop_may_go_on_in_another_layout(alone, two_ranks, runs):
    assert saved_steps(runs / "chain") == [6, 8]
    assert steps(runs / "chain") == ALL
    assert losses(runs / "chain") == pytest.approx(losses(runs / "whole"), rel=1e-4)
    ours, theirs = two_ranks.load("chain_dp2"), alone.load("whole")
    assert ours["error"] is None
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, tensor in theirs["weights"].items():
        assert torch.allclose(ours["weights"][name], tensor, rtol=1e-3, atol=1e-5), name


def test_the_samples_of_every_step_do_not_depend_on_stops_and_layouts(alone, two_ranks, runs):
    whole = audit(runs / "whole")
    assert list(whole) == ALL
    assert all(len(keys) == 4 for keys in whole.values())
    assert audit(runs / "same") == whole
    assert audit(runs / "chain") == whole


def test_pt1_resumes_bit_for_bit_where_rank_0_of_the_pipeline_has_a_frozen_decoder(two_ranks, runs):
    assert steps(runs / "pt1_again") == ALL
    assert losses(runs / "pt1_again") == losses(runs / "pt1")
    assert audit(runs / "pt1_again") == audit(runs / "pt1")
    whole, again = two_ranks.load("pt1_whole"), two_ranks.load("pt1_rest")
    assert set(whole["adam_steps"]) == {8}
    assert again["adam_steps"] == whole["adam_steps"]
    for name, tensor in whole["weights"].items():
        assert torch.equal(again["weights"][name], tensor), name
    first = two_ranks.load("pt1_first")["weights"]
    changed = {name for name in first if not torch.equal(first[name], whole["weights"][name])}
    assert changed
    assert all("projector" in name for name in changed)


def test_a_checkpoint_of_one_replica_goes_on_with_two(two_ranks, runs):
    assert two_ranks.load("pt1_dp2")["error"] is None
    assert steps(runs / "pt1_dp2") == [9]


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_layouts_have_the_same_samples_and_losses(alone, two_ranks, runs, layout):
    assert two_ranks.load(layout)["error"] is None
    assert audit(runs / layout) == audit(runs / "steady")
    assert losses(runs / layout) == pytest.approx(losses(runs / "steady"), rel=1e-6)


def test_other_shares_are_refused_or_announced(alone, runs):
    """With the shares of the rest of the run the samples go on where they were, and stay so."""
    checkpoint = runs / "fewer" / "checkpoints" / "step_00000003"
    assert alone.load("fewer_exact")["error"] == (
        f"ConfigError: trainer.resume_data=exact: {checkpoint} has other data: source toy-image "
        "has 80.00% of the samples (was 40.00%); source toy-video is gone: give what it has, or "
        "take trainer.resume_data=fresh: what has changed begins anew"
    )
    whole, fewer = audit(runs / "whole"), audit(runs / "fewer")
    assert list(fewer) == ALL
    assert [fewer[step] for step in (1, 2, 3)] == [whole[step] for step in (1, 2, 3)]
    pictures = [key for step in ALL for key in fewer[step] if key.startswith("toy-image")]
    assert len(set(pictures)) == len(pictures)  # less than an epoch: none of them twice
    assert not any(key.startswith("toy-video") for step in ALL[3:] for key in fewer[step])


def test_asynchronous_saving_changes_nothing(alone, runs):
    assert saved_steps(runs / "async") == saved_steps(runs / "whole") == [2, 4, 6, 8]
    assert not list(runs.glob("async/checkpoints/.*"))
    assert losses(runs / "async") == losses(runs / "whole")
    ours, theirs = alone.load("async"), alone.load("whole")
    for name, tensor in theirs["weights"].items():
        assert torch.equal(ours["weights"][name], tensor), name


def test_init_from_takes_the_weights_and_nothing_else(alone, runs):
    ours, theirs = alone.load("weights"), alone.load("whole")
    assert ours["error"] is None
    assert set(ours["adam_steps"]) == {2}
    for name, tensor in theirs["weights"].items():
        assert torch.allclose(ours["weights"][name], tensor, rtol=0, atol=1e-9), name
    assert steps(runs / "weights") == [1, 2]
    first = audit(runs / "whole")
    assert audit(runs / "weights") == {1: first[1], 2: first[2]}
    loss, trained = losses(runs / "weights")[0], losses(runs / "whole")
    assert loss < trained[0] - 0.2
    assert math.isfinite(loss)


def test_init_from_refuses_another_architecture(alone, runs):
    checkpoint = runs / "whole" / "checkpoints" / "step_00000008"
    assert alone.load("wider")["error"] == (
        f"ConfigError: model.text.mlp_size=256: the checkpoint {checkpoint} has 384"
    )
    assert not (runs / "wider").exists()


@pytest.mark.parametrize(
    ("name", "resume"), [("ahead", "none"), ("back", "WHOLE/checkpoints/step_00000004")]
)
def test_a_run_folder_that_is_ahead_is_not_mixed_with_an_earlier_course(alone, runs, name, resume):
    resume = resume.replace("WHOLE", str(runs / "whole"))
    assert alone.load(name)["error"] == (
        f"ConfigError: trainer.resume={resume}: {runs}/whole/checkpoints/step_00000008 is ahead of "
        "that: choose another run.dir"
    )
    assert saved_steps(runs / "whole") == [2, 4, 6, 8]
    assert steps(runs / "whole") == ALL
