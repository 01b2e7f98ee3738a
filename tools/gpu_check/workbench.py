"""Builds the model of a case, and times its steps on a random batch."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch

from moss_train import hardware
from moss_train.convert.random_init import random_reader
from moss_train.convert.weights import fill
from moss_train.model.choose_attention import choose_attention
from moss_train.model.choose_kernels import choose_kernels
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.distribute import StepBatch, read_step
from moss_train.parallel.process_groups import build_groups
from moss_train.train.background import BackgroundWork
from moss_train.train.data import microbatch_bounds
from moss_train.train.flops import TrainedParts, step_flops
from moss_train.train.guard import Guard
from moss_train.train.optimizer import make_train_state
from moss_train.train.param_groups import freeze
from moss_train.train.step import StepResult, TrainStep
from moss_train.train.step_plan import StepPlan
from moss_train.train.trace import profiled
from tools.gpu_check.cases import Case

DRAWN_ON_THE_CPU = 10**8  # parameters; larger models are drawn on the device, in seconds


class Workbench:
    """A case's model on one rank. The process group must exist."""

    def __init__(self, case: Case, device: str, folder: str):
        started = time.perf_counter()
        self.case, self.config = case, case.config(device, folder)
        config = self.config
        self.groups = build_groups(config.parallel, seed=1)
        config.model = choose_attention(config.model, config.parallel, self.groups)
        kernels = choose_kernels(config.model)
        self.model = MossVideo(config.model, config.parallel, self.groups, kernels=kernels)
        self.size = sum(p.numel() for _, p in self.model.named_parameters())
        if self.size < DRAWN_ON_THE_CPU:
            fill(self.model, random_reader(config.model, seed=8))
        else:
            _draw(self.model)
        self.counts = freeze(self.model, [*config.stage.train, *config.stage.also])
        self.state = make_train_state(self.model, config, self.counts)
        self.step = TrainStep(config, self.model, self.state, 1, Guard(None, [], 0))
        self.built_s = time.perf_counter() - started

    def batch(self) -> StepBatch:
        """The case's batch, on the device."""
        data, vision = self.config.data, self.config.model.vision
        return read_step(
            self.case.batches(self.config),
            len(self.case.samples),
            microbatch_bounds(self.config),
            data.pad_multiple,
            (data.max_tiles, 3, vision.image_size, vision.image_size),
            self.groups,
            self.step.exchange.shares,
        )

    def measure(self) -> dict[str, Any]:
        """Times the case's steps; then profiles one more."""
        batch, seconds, results = self.batch(), [], []
        plan = self._plan(batch)
        hardware.reset_peak_memory()
        for _ in range(self.case.steps):
            hardware.synchronize()
            started = time.perf_counter()
            following = BackgroundWork(lambda: self._plan(batch), "next step")  # as in a job
            results.append(self.step(batch, plan))
            plan = following.result()
            hardware.synchronize()
            seconds.append(time.perf_counter() - started)
        return {
            "correct": all(map(_learned, results)),
            "losses": [r.loss for r in results],
            "grad_norms": [r.grad_norm for r in results],
            "built_s": self.built_s,
            "first_step_s": seconds[0],
            **self.speed(results[-1], min(seconds[1:])),
            "profile": asdict(profiled(lambda: self.step(batch, plan))),
        }

    def _plan(self, batch: StepBatch) -> StepPlan:
        return StepPlan(batch.microbatches, self.config, self.step.loss)

    def speed(self, result: StepResult, seconds: float) -> dict[str, Any]:
        """The figures of a step that takes `seconds`. MFU and HFU are None on a CPU."""
        trained, config = self.counts.trained, self.config
        parts = TrainedParts(*(trained[part] > 0 for part in ("vision", "projector", "decoder")))
        flops = step_flops(
            config.model, parts, result.counts, config.data.max_tiles, config.parallel.recompute,
            result.kept_frames,
        )  # fmt: skip
        peak = hardware.peak_tflops()
        of_peak = None if peak is None else 1 / (seconds * peak * 1e12)
        tokens = result.counts.tokens + result.counts.text_tokens
        return {
            "step_s": seconds,
            "frames": result.counts.frames,
            "tokens": tokens,
            "frames_per_s": result.counts.frames / seconds,
            "tokens_per_s": tokens / seconds,
            "tflop": flops.total / 1e12,
            "tflop_recomputed": flops.recomputed / 1e12,
            "mfu": of_peak and flops.total * of_peak,
            "hfu": of_peak and (flops.total + flops.recomputed) * of_peak,
            "peak_gb": hardware.peak_memory_gb(),
            "parameters": self.size,
            "trained": sum(trained.values()),
        }


def _learned(result: StepResult) -> bool:
    """Whether the step's loss is a number, and its gradient changed the weights."""
    return result.refused is None and math.isfinite(result.loss) and result.grad_norm > 0


def _draw(model: MossVideo) -> None:
    """Fills a model with random weights, on its device; norms are one, gates a half, biases zero.

    Behind a gate of zero all gradients are zero: nothing would reach the frames, and products of
    zeros draw less of a GPU's power, so that it may run faster than in any training.
    """
    generator = torch.Generator(hardware.device()).manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.rpartition(".")[2]:
                parameter.fill_(0.5)
            elif name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
