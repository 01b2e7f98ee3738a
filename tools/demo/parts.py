"""Lists the commands of the demos and of the comparison of losses, as a user would type them."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_pipeline.toy.build import STAGES
from data_pipeline.toy.stream import NARRATE
from moss_train.data_config import CONTROLS
from moss_train.presets import conf_dir

RECORD = "demo.json"  # in the demo's folder: what was run, and how long it took
BATCH = 16  # samples a step, over all ranks
LIVE = STAGES[-1]
SHORT = 500 * BATCH  # samples of the demo's only stage
BEFORE = 10  # samples of each source that the shipped weights are evaluated on
# What losses.py compares: by the name of a run, the fields that choose its loss.
LOSSES = {
    "weighted": ("loss=weighted", "stage.silence_weight=1.0"),
    "weighted_0.1": ("loss=weighted", "stage.silence_weight=0.1"),
    "state_balanced": ("loss=state_balanced",),
}


@dataclass(frozen=True)
class Part:
    """A command of the demo."""

    name: str
    module: str
    arguments: tuple[str, ...]
    seconds: float  # on two free cores, to estimate the time that is left (docs/toy.md)
    ranks: int = 0  # under torchrun; 0: `python -m module`
    makes: Path | None = None  # a folder that must not exist before

    @property
    def command(self) -> str:
        """The command as a line for a shell."""
        start = f"python -m {self.module}"
        if self.ranks:
            start = f"torchrun --nproc-per-node {self.ranks} -m {self.module}"
        return f"{start} {shlex.join(self.arguments)}"


def short(options: argparse.Namespace) -> list[Part]:
    """The parts of the short demo: the shipped model after `sft` learns to watch live, in five
    minutes with the set-up."""
    out: Path = options.out
    # Few samples: a model that has not learned to be silent yet takes long to play a stream.
    before = ["--stages", LIVE, "--data", str(out / "world"), "--limit", str(BEFORE)]
    before += ["--out", str(out / "before.json")]
    return [
        *_beginning(options),
        _evaluate("evaluate before training", str(out / "start"), options, 10, *before),
        _train(LIVE, [*_learning(options), "trainer.eval_every=100"], options, 120 * options.scale),
        _evaluate(f"evaluate {LIVE}", str(out / LIVE), options, 12),
        *_ending(options),
    ]


def compared(options: argparse.Namespace) -> list[Part]:
    """The parts of the comparison: the short demo's training and evaluation, once with each of
    LOSSES."""
    parts = _beginning(options)
    for name, fields in LOSSES.items():
        more = [*_learning(options), *fields]
        parts.append(_train(LIVE, more, options, 120 * options.scale, name))
        parts.append(_evaluate(f"evaluate {name}", str(options.out / name), options, 12))
    return parts


def _beginning(options: argparse.Namespace) -> list[Part]:
    """The parts that make the short demo's world, and a checkpoint of the shipped weights."""
    shipped, start = str(options.out / "shipped"), str(options.out / "start")
    world = ["--stages", LIVE, "--train", str(options.train or 1_500)]
    return [
        _world(options, [*world, "--heldout", str(options.heldout or 60)], 16),
        Part("unpack the weights", "tools.demo.checkpoint", ("unpack", shipped), 1),
        _convert("import them", "hf-to-megatron", shipped, start),
    ]


def _learning(options: argparse.Namespace) -> list[str]:
    """Overrides of a training that goes on from the shipped weights."""
    start = options.out / "start"
    return [
        f"init_from={start}",
        f"data.tokenizer={start}/tokenizer",
        f"data.samples={_steps(SHORT * options.scale)}",
    ]


def full(options: argparse.Namespace) -> list[Part]:
    """The parts of the full demo: four stages from random weights, each from the one before, in
    about half an hour."""
    world = ["--train", str(options.train or 8_000), "--heldout", str(options.heldout or 200)]
    parts = [_world(options, world, 160)]
    before: list[str] = []
    seconds = {"pt1": (110, 10), "pt2": (190, 10), "sft": (430, 60), LIVE: (290, 90)}
    for stage in STAGES:
        recipe = yaml.safe_load((conf_dir() / f"recipe/toy_{stage}.yaml").read_text())
        samples = f"data.samples={_steps(recipe['data']['samples'] * options.scale)}"
        training, evaluation = seconds[stage]
        run = str(options.out / stage)
        parts.append(_train(stage, [*before, samples], options, training * options.scale))
        # What clips are asked about needs time: other frames, or another order, must not do.
        more = ["--controls", *CONTROLS] if stage in ("sft", LIVE) else []
        parts.append(_evaluate(f"evaluate {stage}", run, options, evaluation, *more))
        before = [f"init_from={run}"]
    return [*parts, *_ending(options)]


def _ending(options: argparse.Namespace) -> list[Part]:
    """The parts that run the streaming command on a held-out clip, and write the page."""
    out: Path = options.out
    export, clip = str(out / "export"), str(out / "clip.mp4")
    watch = ["--checkpoint", export, "--video_path", clip, "--prompt", NARRATE, "--speed", "0"]
    watch += ["--jsonl", str(out / "narration.jsonl")]
    return [
        _convert("export", "megatron-to-hf", str(out / LIVE), export),
        Part("take a held-out clip", "tools.demo.narrate", (str(out / "world"), clip), 1),
        Part("watch it live", "inference.realtime_streaming_infer", tuple(watch), 3),
        Part("write the page", "tools.demo.report", (str(out),), 3),
    ]


def _world(options: argparse.Namespace, more: list[str], seconds: float) -> Part:
    return Part(
        "render the world", "data_pipeline.toy", (str(options.out / "world"), *more), seconds
    )


def _convert(name: str, direction: str, source: str, out: str) -> Part:
    arguments = (direction, source, out)
    return Part(name, "tools.convert_checkpoint", arguments, 1, makes=Path(out))


def _evaluate(
    name: str, checkpoint: str, options: argparse.Namespace, seconds: float, *more: str
) -> Part:
    suite = ("--checkpoint", checkpoint, "--suite", "toy", "--threads", str(options.ranks))
    return Part(name, "tools.evaluate", (*suite, *more), seconds)


def _train(
    stage: str,
    more: list[str],
    options: argparse.Namespace,
    seconds: float,
    run: str | None = None,
) -> Part:
    """The part that trains a stage. `run`: name of its folder (default: the stage's)."""
    overrides = [
        f"stage={stage}",
        "model=toy",
        "data=toy",
        "hardware=cpu",
        "hardware.threads=1",  # more gain little in so small products, and lose to the loader
        f"data.root={options.out / 'world'}",
        f"run.dir={options.out / (run or stage)}",
        "trainer.console_every=50",
        f"data.global_batch={BATCH}",
        f"data.micro_batch={BATCH // options.ranks}",
        *more,
        *options.overrides,
    ]
    return Part(f"train {run or stage}", "moss_train", tuple(overrides), seconds, options.ranks)


def _steps(samples: float) -> int:
    """The number of samples rounded to whole steps, at least one."""
    return max(1, round(samples / BATCH)) * BATCH
