"""Defines the training steps that are measured; their batches are random, so no data is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.batch import IGNORED_LABEL, EncodedSample, MicroBatch, collate
from moss_train.compose import load_config
from moss_train.config import Config

# Checkpoints name their tokenizer; the batches here are not made by one.
TOKENIZER = Path(__file__).resolve().parents[1] / "demo" / "checkpoint"


@dataclass(frozen=True)
class Sample:
    """The layout of a sample: `before` tokens of text, `frames` with `gap` tokens after each, then
    `after` tokens."""

    before: int
    frames: int
    gap: int
    after: int

    def encoded(self, config: Config, generator: torch.Generator) -> EncodedSample:
        """The sample with random tokens and pixels; all text after the first frame is learned."""
        vision, tiles = config.model.vision, config.data.max_tiles
        positions = self.before + torch.arange(self.frames) * (self.gap + 1)
        length = self.before + self.frames * (self.gap + 1) + self.after
        tokens = torch.randint(0, config.model.text.vocab_size, (length,), generator=generator)
        labels = tokens.clone()
        labels[: self.before] = IGNORED_LABEL
        labels[positions] = IGNORED_LABEL
        size = (self.frames, tiles, 3, vision.image_size, vision.image_size)
        return EncodedSample(
            "made/1",
            tokens,
            labels,
            torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
            positions,
            torch.ones(self.frames, dtype=torch.long),
        )


@dataclass(frozen=True)
class Case:
    """A training step that is measured."""

    stage: str
    model: str  # preset of conf/model
    samples: tuple[Sample, ...]  # of a step
    micro: int | None  # samples of a microbatch at most; None: the default
    overrides: tuple[str, ...] = ()
    steps: int = 4  # that are timed; the first also plans kernels

    def config(self, device: str, folder: str) -> Config:
        """The configuration of a run with this step on one rank."""
        return load_config(
            self.stage,
            overrides=[
                f"model={self.model}", "parallel=single", f"hardware={device}",
                "data=shards", f"data.tokenizer='{TOKENIZER}'",
                f"run.dir='{folder}'", "trainer.steps=100",
                f"data.global_batch={len(self.samples)}",
                f"data.micro_batch={self.micro or 'null'}",
                *self.overrides,
            ],
        )  # fmt: skip

    def batches(self, config: Config) -> Iterator[MicroBatch]:
        """The samples of one step, as the loader yields them."""
        generator = torch.Generator().manual_seed(7)
        for sample in self.samples:
            yield collate([sample.encoded(config, generator)], pad_token_id=0)


# 11B with 5 of its 40 decoder layers, one of them cross-attention: what fits on a GPU with all
# gradients and Adam's state, 3.0 B parameters.
CUT = ("model.text.num_layers=5", "model.text.cross_attention_layers=[3]")
FP8, TOWER_FP8 = ("model.fp8=all",), ("model.fp8=tower",)
CASES = {
    "pt1": Case("pt1", "11b", (Sample(6, 64, 0, 400),) * 4, 4),
    "pt1_fp8": Case("pt1", "11b", (Sample(6, 64, 0, 400),) * 4, 4, TOWER_FP8),
    "everything": Case("pt2", "11b", (Sample(6, 16, 0, 400),) * 8, 8, CUT),
    "decoder": Case("pt2", "11b", (Sample(0, 0, 0, 512),) * 64, 8, CUT),
    "decoder_fp8": Case("pt2", "11b", (Sample(0, 0, 0, 512),) * 64, 8, (*CUT, *FP8)),
    "short": Case("pt2", "11b", (Sample(0, 0, 0, 512),) * 64, None, CUT),
    "realtime": Case("realtime_sft", "11b", (Sample(40, 256, 8, 0),), 1, CUT, steps=3),
}
# The same on a CPU in a second each.
REHEARSED = {
    "pt1": Case("pt1", "tiny", (Sample(6, 2, 0, 20),) * 2, 2, steps=2),
    "pt1_fp8": Case("pt1", "tiny", (Sample(6, 2, 0, 20),) * 2, 2, TOWER_FP8, steps=2),
    "everything": Case("pt2", "tiny", (Sample(6, 2, 0, 20),) * 2, 2, steps=2),
    "decoder": Case("pt2", "tiny", (Sample(0, 0, 0, 32),) * 4, 2, steps=2),
    "decoder_fp8": Case("pt2", "tiny", (Sample(0, 0, 0, 32),) * 4, 2, FP8, steps=2),
    "short": Case("pt2", "tiny", (Sample(0, 0, 0, 32),) * 2, None, steps=2),
    "realtime": Case("realtime_sft", "tiny", (Sample(8, 6, 3, 0),), 1, steps=2),
}
ASYNC = ("trainer.async_save=true",)
SAVED = Case("pt2", "11b", (Sample(6, 4, 0, 100),), 1, (*CUT, *ASYNC), steps=1)
RESUMED = Case("pt2", "tiny", (Sample(6, 2, 0, 20),) * 2, 1, ASYNC, steps=2)
# What CPU and GPU compute alike: every stage, small and in fp32.
STAGES = {
    stage: Case(
        stage,
        "tiny",
        (Sample(6, 3, 2, 20), Sample(4, 0, 0, 30), Sample(6, 1, 0, 12), Sample(8, 9, 3, 0)),
        2,
        ("optimizer.lr=1e-3", "stage.warmup_steps=0"),
        steps=10,
    )
    for stage in ("pt1", "pt2", "sft", "realtime_sft")
}
