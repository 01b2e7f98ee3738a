"""What a rank needs at least is known; where it is not there, the job is refused at once."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from moss_train import hardware
from moss_train.config import Config, ConfigError, ParallelConfig, StageConfig
from moss_train.model.hf_mapping import our_shape, table
from moss_train.train.activations import Batch
from moss_train.train.memory_check import check_fits, largest_batch, least_bytes, peak_bytes
from moss_train.train.optimizer import make_train_state
from moss_train.train.param_groups import freeze
from tests.moss_train.model.build import preset, random_model
from tests.torchrun import REPO
from tools.gpu_check.cases import CASES


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
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = (line for line in done.stderr.splitlines() if "needs at least" in line)
    assert "weights" in line
    assert "parallel.tensor (1)" in line
    assert not (tmp_path / "run").exists()


def test_the_largest_microbatch_is_what_the_bounds_allow() -> None:
    config = config_of("11b", ["*"], pipeline=2)
    config.stage.mixture.text, config.stage.mixture.image, config.stage.mixture.video = 0, 0, 1
    # Bounds of 4,096 tokens and 256 frames; videos have up to 64.
    assert largest_batch(config, 2) == Batch(4096, 3840, 256, 0, 2, 512)
    config.data.micro_batch = 2
    assert largest_batch(config, 2).frames == 128
    config.stage.mixture.video, config.stage.mixture.text = 0, 1
    config.data.sequence_length = 1000
    assert largest_batch(config, 2) == Batch(2048, 2048, 0, 0, 2, 0)  # of 2,000, padded
    config.data.max_tokens_per_batch = 500
    assert largest_batch(config, 2).tokens == 1024  # one sample that is longer


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """gpu(size): this machine claims to have a GPU with so many bytes."""

    def has(size: float) -> None:
        monkeypatch.setattr(hardware, "has_accelerator", lambda: True)
        monkeypatch.setattr(hardware, "kind_of", lambda asked: asked.replace("auto", "cuda"))
        monkeypatch.setattr(hardware, "device_name", lambda: "NVIDIA H200")
        monkeypatch.setattr(hardware, "total_memory", lambda: int(size))

    return has


def test_a_batch_that_cannot_fit_is_refused_with_what_to_change(gpu, caplog) -> None:
    config = config_of("11b", ["projector.*", "decoder.*"])
    config.model.text.num_layers, config.model.text.cross_attention_layers = 10, [3]
    needed = sum(peak_bytes(config, 1, largest_batch(config, 1)).values())
    assert sum(least_bytes(config, 1).values()) < 0.9 * needed
    gpu(0.99 * needed)
    with pytest.raises(ConfigError) as refused:
        check_fits(config)
    (line,) = refused.value.problems
    assert "a microbatch of 4096 tokens and 256 frames" in line
    assert f"needs {needed / 1e9:.1f} GB" in line
    for field in (
        "parallel.recompute=selective (", "parallel.recompute=full (",
        "data.max_tokens_per_batch (4096)", "data.micro_batch (null)", "parallel.tensor (1)",
    ):  # fmt: skip
        assert field in line
    caplog.set_level("INFO")
    gpu(1.01 * needed)
    check_fits(config)
    (record,) = caplog.records
    assert f"{needed / 1e9:.1f} GB" in record.getMessage()


def test_kept_frames_are_counted_and_a_number_that_fits_is_named(gpu, caplog) -> None:
    """`everything`, with the figures of docs/gpu.md ("What a step keeps")."""
    config = CASES["everything"].config("cpu", "x")
    config.parallel.recompute, config.model.vision.frames_per_chunk = "selective", 8
    config.hardware.device = "cuda"
    batch = Batch(3376, 3200, 128, 0, 1, 128)

    def needed(kept: int, batch: Batch = batch) -> float:
        config.model.vision.kept_frames = kept
        return sum(peak_bytes(config, 1, batch).values()) / 1e9

    sizes = {kept: round(needed(kept)) for kept in (0, 8, 16, 20, 40, 128, 1000)}
    assert sizes == {0: 69, 8: 73, 16: 86, 20: 86, 40: 128, 128: 280, 1000: 280}
    config.model.vision.kept_frames = 300
    assert largest_batch(config, 1).step_frames == 300
    assert largest_batch(config, 2).step_frames == 256  # of a replica: 4 clips of 64 frames at most
    gpu(1e9 * needed(300, largest_batch(config, 1)) - 1e9)
    with pytest.raises(ConfigError, match=r"model\.vision\.kept_frames \(300\)"):
        check_fits(config)
    caplog.set_level("INFO")
    gpu(150e9)
    config.model.vision.kept_frames = 0
    check_fits(config)
    named = caplog.records[-1].getMessage().partition("; ")[2]
    size, number = named.split(" with model.vision.kept_frames=")
    config.model.vision.kept_frames = int(number)
    assert needed(int(number), largest_batch(config, 1)) == pytest.approx(float(size), abs=0.06)
    assert float(size) < 0.9 * 150 < needed(int(number) + 8, largest_batch(config, 1))
    for kept, train in ((int(number), ["*"]), (0, ["projector.*"])):
        config.model.vision.kept_frames, config.stage.train = kept, train
        check_fits(config)
        assert ";" not in caplog.records[-1].getMessage()


def test_on_a_cpu_a_batch_is_not_judged(caplog) -> None:
    config = config_of("tiny", ["*"])
    config.hardware.device = "cpu"
    config.data.max_tokens_per_batch = config.data.sequence_length = 10**9
    caplog.set_level("INFO")
    check_fits(config)
    assert not caplog.records


def test_what_an_h200_has_taken_was_predicted() -> None:
    """docs/gpu.md, "Last measured": peak GB of the cases of tools/gpu_check there."""
    measured = {"pt1": 36, "everything": 101, "realtime": 102}
    for name, peak in measured.items():
        case = CASES[name]
        config = case.config("cpu", "x")
        config.model.kernels, config.model.vision.frames_per_chunk = "torch", 16  # as it was then
        config.parallel.recompute = "none"
        together = case.samples[: case.micro]
        frames = sum(s.frames for s in together)
        tokens = sum(s.before + s.frames * (s.gap + 1) + s.after for s in together)
        labels = tokens - frames - sum(s.before for s in together)
        masked = tokens * frames // 2 if name == "realtime" else 0
        batch = Batch(tokens, labels, frames, masked, 1, sum(s.frames for s in case.samples))
        predicted = sum(peak_bytes(config, 1, batch).values()) / 1e9
        assert predicted == pytest.approx(peak, rel=0.1), name
