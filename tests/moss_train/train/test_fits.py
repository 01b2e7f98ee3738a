"""What a rank needs at least is known; where it is not there, the job is refused at once."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from moss_train.config import Config, ParallelConfig, StageConfig
from moss_train.model.hf_mapping import our_shape, table
from moss_train.train.fits import least_bytes
from moss_train.train.optimizer import make_train_state
from moss_train.train.param_groups import freeze
from tests.moss_train.model.build import preset, random_model
from tests.torchrun import REPO


def config_of(name: str, train: list[str], dtype: str = "bf16", **layout) -> Config:
    made = Config(model=preset(name, dtype=dtype), parallel=ParallelConfig(**layout))
    made.stage = StageConfig(train=train)
    made.data.max_tiles = 1
    return made


@pytest.mark.parametrize("train", [["*"], ["projector.*"], ["projector.*", "decoder.*"]])
def test_it_is_what_a_rank_has(groups, train: list[str]) -> None:
    """Weights, fp32 gradients and, after an update, Adam's moments, of a model in fp32."""
    config = config_of("tiny", train, "fp32")
    model = random_model(config.model, groups)
    state = make_train_state(model, config, freeze(model, train))
    for _, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(1)  # type: ignore[attr-defined]
    state.optimizer.step()
    moments = sum(
        value.nbytes
        for adam in state.optimizer.adams()
        for kept in adam.state.values()
        for value in kept.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )
    parameters = [p for _, p in model.named_parameters()]
    trained = [p for p in parameters if p.requires_grad]
    found = least_bytes(config, 1)
    assert found["weights"] == sum(p.nbytes for p in parameters)
    gradients = [p.main_grad for p in trained]  # type: ignore[attr-defined]
    assert found["gradients"] == sum(gradient.nbytes for gradient in gradients)
    assert found["optimizer"] == moments


def test_ranks_share_the_decoder_and_the_optimizer() -> None:
    """Of the 11B model, by its table of parameters."""
    model = preset("11b", dtype="bf16")
    counts = {rule.ours: math.prod(our_shape(model, rule)) for rule in table(model)}
    total = sum(counts.values())
    alone = least_bytes(config_of("11b", ["*"]), 1)
    assert (alone["weights"], alone["gradients"], alone["optimizer"]) == (
        2 * total, 4 * total, 12 * total,
    )  # fmt: skip
    eight = least_bytes(config_of("11b", ["*"]), 8)
    assert eight["weights"] == alone["weights"]
    assert eight["optimizer"] == pytest.approx(alone["optimizer"] / 8)
    sliced = least_bytes(config_of("11b", ["*"], tensor=2, pipeline=2), 8)
    decoder = sum(count for name, count in counts.items() if name.startswith("decoder."))
    assert sliced["weights"] == pytest.approx(2 * (total - decoder) + 2 * decoder / 4, rel=1e-3)
    assert sliced["optimizer"] == pytest.approx(
        12 * (total - decoder) / 8 + 12 * decoder / 4 / 2, rel=1e-3
    )
    frozen = least_bytes(config_of("11b", ["projector.*"]), 1)
    assert frozen["weights"] == alone["weights"]
    assert frozen["optimizer"] < alone["optimizer"] / 100
    assert frozen["activations of a frame"] == 0


def test_a_job_that_cannot_fit_ends_with_one_line(small, tmp_path) -> None:
    """90B on the CPU of any machine that runs tests."""
    options = [option for option in small if not option.startswith("model=")]
    done = subprocess.run(
        [sys.executable, "-m", "moss_train", *options, "model=90b", f"run.dir={tmp_path}/run",
         "stage.train=[*]", "data.max_tiles=1", "model.attention=sdpa"],
        cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = (line for line in done.stderr.splitlines() if "needs at least" in line)
    assert "weights" in line
    assert "parallel.tensor (1)" in line
    assert not (tmp_path / "run").exists()
