"""Measures what FP8 products change in how a model learns: its losses beside bf16's, from equal
weights.

    python -m tools.bench.fp8 --model toy --steps 300

Samples are made: frames of one colour each; after each of them the model has to name its colour and
that of the frame before. A CPU computes what a GPU would (moss_train/model/fp8.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from statistics import mean

import torch
import torch.distributed as dist

from data_pipeline.batch import IGNORED_LABEL, EncodedSample, MicroBatch, collate
from data_pipeline.commands import DONE, CommandParser
from data_pipeline.tables import format_table
from moss_train import hardware
from moss_train.compose import load_config
from moss_train.config import Config
from moss_train.convert.random_init import random_reader
from moss_train.convert.weights import fill
from moss_train.model.choose_kernels import choose_kernels
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.distribute import read_step
from moss_train.parallel.packing import Bounds
from moss_train.parallel.process_groups import build_groups
from moss_train.train.guard import Guard
from moss_train.train.optimizer import make_train_state
from moss_train.train.param_groups import freeze
from moss_train.train.step import TrainStep

PARTS = ("none", "tower", "all")
FRAMES, COLOURS, FIRST_NAME = (
    6,
    27,
    100,
)  # of a sample; three values of red, green and blue; a token
SAMPLES = 16  # of a step
SIZES = {
    "toy": ("model=toy",),
    # 9 M parameters.
    "middle": (
        "model=toy", "model.text.hidden_size=256", "model.text.mlp_size=768",
        "model.vision.hidden_size=128", "model.vision.mlp_size=512", "model.vision.num_layers=8",
    ),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = CommandParser("python -m tools.bench.fp8", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=SIZES, default="toy", help="(default: toy)")
    parser.add_argument("--steps", type=int, default=300, help="of each run (default: 300)")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="some of them"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="peak (default: 1e-3)")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    hardware.activate("auto")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    width = max(1, args.steps // 10)
    rows = [["steps", *(f"{first + 1}-{first + width}" for first in range(0, args.steps, width))]]
    for part in args.only:
        losses = list(train(args.model, part, args.steps, args.lr))
        means = (mean(losses[first : first + width]) for first in range(0, args.steps, width))
        rows.append([f"model.fp8={part}", *(f"{loss:.4f}" for loss in means)])
        print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print(format_table(list(zip(*rows, strict=True))))
    return DONE


def train(size: str, part: str, steps: int, lr: float) -> Iterator[float]:
    """Trains; the loss of each step."""
    config = load_config(
        "sft",
        overrides=[
            *SIZES[size], "parallel=single", "data=shards", "data.tokenizer=x", "run.dir=x",
            "model.dtype=bf16", f"model.fp8={part}", "model.vision.frames_per_chunk=128",
            f"optimizer.lr={lr}", f"trainer.steps={steps}", "stage.warmup_steps=20",
            f"data.global_batch={SAMPLES}",
        ],
    )  # fmt: skip
    groups = build_groups(config.parallel, seed=1)
    model = MossVideo(config.model, config.parallel, groups, kernels=choose_kernels(config.model))
    fill(model, random_reader(config.model, seed=1))
    state = make_train_state(model, config, freeze(model, ["*"]))
    step = TrainStep(config, model, state, silence_id=1, guard=Guard(None, [], 0))
    vision, made = config.model.vision, samples(config)
    shape = (1, 3, vision.image_size, vision.image_size)
    for _ in range(steps):
        batch = read_step(made, SAMPLES, Bounds(), 16, shape, groups, step.exchange.shares)
        yield step(batch).loss


def samples(config: Config) -> Iterator[MicroBatch]:
    """Yields samples without end, the same for each run."""
    generator = torch.Generator().manual_seed(1)
    image, size = config.model.text.vocab_size, config.model.vision.image_size
    places = torch.arange(FRAMES) * 3 + 1
    while True:
        colours = torch.randint(0, COLOURS, (FRAMES,), generator=generator)
        tokens = torch.full((2 + 3 * FRAMES,), 2)
        tokens[places] = image
        tokens[places + 1] = FIRST_NAME + colours
        tokens[places + 2] = FIRST_NAME + colours.roll(1)
        labels = tokens.clone()
        labels[[0, -1]] = labels[places] = IGNORED_LABEL
        labels[places[0] + 2] = IGNORED_LABEL  # there is none before
        shades = torch.stack((colours // 9, colours // 3 % 3, colours % 3), 1)
        frames = (shades * 100)[:, None, :, None, None].expand(FRAMES, 1, 3, size, size)
        noise = torch.randint(0, 50, frames.shape, generator=generator)
        sample = EncodedSample(
            "made/1", tokens, labels, (frames + noise).byte(), places,
            torch.ones(FRAMES, dtype=torch.long),
        )  # fmt: skip
        yield collate([sample], pad_token_id=0)


if __name__ == "__main__":
    raise SystemExit(main())
