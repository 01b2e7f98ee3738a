"""The learning rate and decay of each parameter, and an update against torch's AdamW in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fnmatch import fnmatchcase
from math import cos, pi
from types import SimpleNamespace

import pytest
import torch

from moss_train.config import Config, ConfigError, StageConfig
from moss_train.data_config import MixtureConfig
from moss_train.model.moss_video import MossVideo
from moss_train.train.optimizer import TrainState, make_train_state, schedule_warnings, scheduler
from moss_train.train.param_groups import Counts, check_gradients, freeze
from tests.moss_train.model.build import preset, random_model

Built = tuple[MossVideo, TrainState, Counts]
LR = 1e-3


@pytest.fixture
def build(groups) -> Callable[..., Built]:
    """build(patterns, **optimizer fields): a tiny model as it trains, ten steps of 1e-3."""

    def built(patterns: list[str], **options) -> Built:
        config = Config(model=preset("tiny"))
        config.trainer.steps = 10
        config.optimizer.lr = LR
        config.stage.schedule, config.stage.warmup_steps = "constant", 0
        for name, value in options.items():
            setattr(config.stage if hasattr(config.stage, name) else config.optimizer, name, value)
        model = random_model(config.model, groups)
        counts = freeze(model, patterns)
        return model, make_train_state(model, config, counts), counts

    return built


def accept(_: torch.Tensor) -> torch.Tensor:
    """Refuses nothing."""
    return torch.zeros(())


def test_counts_are_those_of_the_model(build):
    model, _, counts = build(["projector.*", "*norm.weight", "*.q_norm.weight"])
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert counts.total == {
        part: sum(n for name, n in sizes.items() if name.startswith(part))
        for part in ("vision", "projector", "decoder")
    }
    assert (
        counts.trained["projector"]
        == counts.patterns["projector.*"]
        == sum(n for name, n in sizes.items() if name.startswith("projector."))
    )
    assert counts.patterns["*.q_norm.weight"] == 2 * 16  # two layers, heads of 64 / 4
    # Six layers with two norms of width 64, q_norm and k_norm of 16 in two of them, the final norm.
    assert counts.patterns["*norm.weight"] == 6 * 2 * 64 + 2 * 2 * 16 + 64 + 2 * 6 * 32
    assert counts.trained["decoder"] == 6 * 2 * 64 + 2 * 2 * 16 + 64
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "decoder.final_norm.weight" in trained
    assert "decoder.embedding.weight" not in trained
    assert "trains *.q_norm.weight: 32 parameters" in list(counts.lines())


MULTIPLIERS = {"vision.*": 0.1, "decoder.layers.*": 0.5, "decoder.layers.5.mlp.*": 2.0}


def expected_rate(name: str) -> float:
    if name.startswith("decoder.layers.5.mlp."):
        return 2.0 * LR
    if name.startswith("decoder.layers."):
        return 0.5 * LR
    return 0.1 * LR if name.startswith("vision.") else LR


def expected_decay(name: str, embeddings: bool) -> float:
    if "norm" in name or "gate" in name or name.endswith(".bias"):
        return 0.0
    inside = ("decoder.embedding.weight", "vision.class_embedding", "vision.position.embedding")
    tiles = fnmatchcase(name, "vision.*tile*embedding.weight")
    return 0.0 if not embeddings and (name in inside or tiles) else 0.1


@pytest.mark.parametrize("embeddings", [True, False])
def test_an_update_is_that_of_adamw_with_the_same_groups(build, embeddings):
    model, state, _ = build(
        ["*"], lr_multipliers=MULTIPLIERS, decay_embeddings=embeddings, clip_grad=0.0
    )
    named = dict(model.named_parameters())
    exact = {name: p.detach().double().requires_grad_() for name, p in named.items()}
    reference = torch.optim.AdamW(
        [
            {
                "params": [tensor],
                "lr": expected_rate(name),
                "weight_decay": expected_decay(name, embeddings),
            }
            for name, tensor in exact.items()
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        state.zero_gradients()
        for name, parameter in named.items():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.copy_(gradient)
            exact[name].grad = gradient.double()
        assert state.update(accept) > 0
        reference.step()
    parameter.main_grad.fill_(torch.inf)
    # Refused: nothing changes, whatever the gradient is, and Adam does not count it.
    assert state.update(lambda norm: norm.isinf().float()) == torch.inf
    state.take_back()
    for name, parameter in named.items():
        torch.testing.assert_close(
            parameter.detach().double(), exact[name].detach(), rtol=1e-5, atol=1e-7, msg=name
        )
    assert {group["step"] for group in state.optimizer.param_groups} == {3}
    assert state.last_lr == LR
    rates = sorted({group["lr"] for group in state.optimizer.param_groups})
    assert rates == pytest.approx([0.1 * LR, 0.5 * LR, LR, 2 * LR])


def wsd(step: int) -> float:
    if step <= 2:
        return step / 2
    return 1.0 if step <= 6 else 0.1 + 0.9 * (11 - step) / 5  # four steps fall


def cosine(step: int) -> float:
    return step / 3 if step <= 3 else 0.1 + 0.9 * (1 + cos(pi * (step - 3) / 8)) / 2


SCHEDULES: dict[str, tuple[Callable[[int], float], dict]] = {
    "wsd": (wsd, {"warmup_steps": 2, "decay_ratio": 0.4}),
    "cosine": (cosine, {"warmup_steps": None, "warmup_ratio": 0.3}),
    "linear": (lambda step: 0.1 + 0.9 * (11 - step) / 10, {}),
    "constant": (lambda step: min(1.0, step / 4), {"warmup_steps": 4, "warmup_ratio": 0.9}),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_of_each_step(build, schedule):
    """By hand: of 10 steps, down to a tenth after them; a group learns at a tenth throughout."""
    factor, options = SCHEDULES[schedule]
    _, state, _ = build(
        ["vision.*", "projector.*"],
        schedule=schedule,
        min_lr_ratio=0.1,
        lr_multipliers={"vision.*": 0.1},
        **options,
    )
    for step in range(1, 11):
        rates = {group["lr_mult"]: group["lr"] for group in state.optimizer.param_groups}
        assert rates[1.0] == pytest.approx(LR * factor(step))
        assert rates[0.1] == pytest.approx(0.1 * LR * factor(step))
        state.zero_gradients()
        state.update(accept)
        assert state.last_lr == pytest.approx(LR * factor(step))


def rates(**options) -> list[float]:
    """The rates of a run's steps, of a peak of 1, as megatron's scheduler computes them."""
    config = Config()
    config.optimizer.lr, config.trainer.steps = 1.0, options.pop("steps")
    for name, value in options.items():
        setattr(config.stage, name, value)
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = scheduler(config, optimizer)
    found = []
    for _ in range(config.steps):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step(1)
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_every_step_trains_and_some_step_has_the_peak(schedule, steps):
    for warmup, decay in itertools.product([None, 0, 1, steps - 1, steps, 50], [0.0, 0.1, 0.5, 1]):
        options = {"warmup_steps": warmup, "schedule": schedule, "decay_ratio": decay}
        found = rates(steps=steps, **options)
        assert min(found) > 0, options
        assert max(found) == 1.0, options
        peak = found.index(1.0)
        assert found[: peak + 1] == sorted(found[: peak + 1])
        assert found[peak:] == sorted(found[peak:], reverse=True)


def test_the_rate_reaches_its_floor_one_step_after_the_last():
    assert rates(steps=4, schedule="linear", warmup_steps=0) == [1.0, 0.75, 0.5, 0.25]
    assert rates(steps=4, schedule="wsd", warmup_ratio=0, decay_ratio=0.5) == pytest.approx(
        [1.0, 1.0, 2 / 3, 1 / 3]
    )


def test_a_warm_up_or_a_fall_that_does_not_fit_is_announced():
    config = Config()
    config.trainer.steps = 10
    assert list(schedule_warnings(config)) == []
    config.stage.warmup_steps = 11
    (line,) = schedule_warnings(config)
    assert line.startswith("the warm-up of 11 steps does not fit into the 10 of the run: ")
    config.stage.warmup_steps, config.stage.schedule, config.stage.decay_ratio = 4, "wsd", 0.8
    (line,) = schedule_warnings(config)
    assert line == (
        "stage.decay_ratio=0.8: 8 of 10 steps, of which the warm-up takes 4: the rate falls in the "
        "last 6"
    )
    config.stage.decay_ratio = 0.6
    assert list(schedule_warnings(config)) == []


def test_a_multiplier_without_parameters_is_an_error(build):
    with pytest.raises(ConfigError, match=r"optimizer.lr_multipliers=\['tower.\*'\]: matches no"):
        build(["*"], lr_multipliers={"tower.*": 0.1})


PT1 = StageConfig(mixture=MixtureConfig(text=1, image=79, video=20))


def test_a_stage_that_trains_what_text_does_not_reach_is_refused(build):
    """It ran to its end with a gradient of 0, and saved the weights that it had begun with."""
    texts = StageConfig(mixture=MixtureConfig(text=100, image=0, video=0))
    model, _, counts = build(["projector.*"])
    check_gradients(model, counts, PT1)
    with pytest.raises(ConfigError, match=r"'text': 100.*: all samples are text, and what trains "
                       r"\(projector\.\*\) is reached by frames alone"):  # fmt: skip
        check_gradients(model, counts, texts)
    model, _, counts = build(["projector.*", "decoder.*"])
    check_gradients(model, counts, texts)


def test_a_stage_whose_gates_are_closed_and_do_not_train_is_refused(build):
    model, _, counts = build(["projector.*"])
    gates = [p for name, p in model.named_parameters() if name.endswith("attn_gate")]
    assert len(gates) == 2
    check_gradients(model, counts, PT1)
    for gate in gates:
        gate.data.zero_()
    with pytest.raises(
        ConfigError, match=r"stage pt1: projector would get no gradient: every gate"
    ):
        check_gradients(model, counts, PT1)
    gates[1].data.fill_(0.1)
    check_gradients(model, counts, PT1)
    gates[1].data.zero_()
    gates[0].requires_grad = True
    check_gradients(model, counts, PT1)
