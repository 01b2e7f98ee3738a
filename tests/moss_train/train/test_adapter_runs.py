"""Adapters over the life of a run: on an earlier stage's weights, resumed elsewhere, merged."""

from __future__ import annotations

import pytest
import torch

from tests.moss_train.train.runs import losses, steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def outcomes(small, run_jobs, runs):
    """One process, then two ranks that go on from it."""

    def task(name, folder, *more, **options):
        overrides = [*small, "data.workers=2", "trainer.steps=4", *more, f"run.dir={runs / folder}"]
        return {"name": name, "overrides": overrides, **options}

    lora = ["adapter=lora", "adapter.rank=4", f"init_from={runs / 'base'}"]
    still = "optimizer.lr=1e-12"
    one = run_jobs(
        1,
        task("base", "base", "trainer.steps=1"),
        task("whole", "whole", *lora),
        task("first", "chain", *lora, stop_after=2),
        task("other", "chain", *lora, "adapter.rank=8"),
        task("start", "start", *lora, still, "trainer.steps=1"),
    )
    two = run_jobs(
        2,
        task("rest", "chain", *lora, "parallel=tp2"),
        task("merged", "merged", f"init_from={runs / 'whole'}", still, "trainer.steps=1",
             "parallel=pp2"),
    )  # fmt: skip
    return {"base": one, "whole": one, "first": one, "other": one, "start": one,
            "rest": two, "merged": two}  # fmt: skip


def weights(outcomes, name: str) -> dict[str, torch.Tensor]:
    found = outcomes[name].load(name)
    assert found["error"] is None
    return found["weights"]


def test_adapters_start_on_the_weights_of_the_stage_before(outcomes):
    base, start = weights(outcomes, "base"), weights(outcomes, "start")
    assert base.keys() == start.keys()
    for name, tensor in base.items():
        assert torch.allclose(start[name], tensor, rtol=0, atol=1e-9), name


def test_adapters_change_what_they_adapt_and_go_on_in_another_layout(outcomes, runs):
    assert steps(runs / "chain") == [1, 2, 3, 4]
    assert losses(runs / "chain") == pytest.approx(losses(runs / "whole"), rel=1e-4)
    base, whole, rest = (weights(outcomes, name) for name in ("base", "whole", "rest"))
    for name, tensor in whole.items():
        assert torch.allclose(rest[name], tensor, rtol=1e-3, atol=1e-5), name
    changed = {name for name in base if not torch.allclose(base[name], whole[name], atol=1e-7)}
    layers = [n for n in changed if n.startswith("language_model.")]
    assert len(layers) > 20
    assert all("proj" in name for name in layers)  # neither norms nor gates nor embeddings


def test_a_run_without_adapters_starts_from_merged_ones(outcomes):
    whole, merged = weights(outcomes, "whole"), weights(outcomes, "merged")
    for name, tensor in whole.items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-6), name


def test_a_run_keeps_its_adapters(outcomes, runs):
    error = outcomes["other"].load("other")["error"]
    assert error.startswith("ConfigError: adapter (rank=8): the checkpoint ")
    assert "has another one: {'name': 'lora', 'rank': 4, 'alpha': 32.0" in error
