"""python -m tools.demo [--out runs/demo] [--scale 1]

Renders the toy world, trains pt1, pt2, sft and realtime_sft one after the other, evaluates each on
held-out worlds, and writes OUT/report.html. At last the real-time model is exported, and tells a
clip that it has not seen. What is finished already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from data_pipeline.commands import FAILED, report_error
from data_pipeline.toy.build import STAGES
from data_pipeline.toy.stream import NARRATE
from inference.session.view import clock
from tools import preloaded
from tools.demo.narrate import held_out_clip, told

REPO = Path(__file__).resolve().parents[2]
BATCH = 16  # samples a step, over all ranks


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo. The exit code is that of the first command that fails."""
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m tools.demo", usage=first, description=rest)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--train", type=int, default=4_000, help="samples of each source")
    parser.add_argument("--heldout", type=int, default=100, help="samples of each source")
    parser.add_argument("--ranks", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--scale", type=float, default=1, help="of each stage's samples: 0.1, 3")
    parser.add_argument("overrides", nargs="*", help="of all stages: model.dtype=bf16")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    times = _Times(options.out / "times.json")
    try:
        world = ["--train", str(options.train), "--heldout", str(options.heldout)]
        times.run("world", "data_pipeline.toy", str(options.out / "world"), *world)
        before: Path | None = None
        for stage in STAGES:
            run = options.out / stage
            training = _training(stage, run, before, options)
            times.run(f"train {stage}", "torch.distributed.run", *training)
            scores = ["--checkpoint", str(run), "--suite", "toy", "--threads", str(options.ranks)]
            times.run(f"evaluate {stage}", "tools.evaluate", *scores)
            before = run
        preloaded.run("tools.demo.report", str(options.out), *STAGES)
        _narrate(options.out, times)
    except subprocess.CalledProcessError as error:
        failed = f"{' '.join(map(str, error.cmd))} ended with exit code {error.returncode}"
        return report_error(parser.prog, failed, error.returncode or FAILED)
    return 0


def _narrate(out: Path, times: _Times) -> None:
    """What happens in a held-out clip, then what the model says to it through the real command."""
    run, export, clip = out / "realtime_sft", out / "export", out / "clip.mp4"
    times.run("export", "tools.convert_checkpoint", "megatron-to-hf", str(run), str(export))
    truth = told(held_out_clip(out / "world", clip))
    print(f"--- what happens in {clip}, which no training has seen")
    print("\n".join(f"{clock(second)}  {words}" for second, words in truth))
    print("--- what the model says, frame by frame", flush=True)
    watch = ["--checkpoint", str(export), "--video_path", str(clip), "--prompt", NARRATE]
    preloaded.run("inference.realtime_streaming_infer", *watch, "--speed", "0")


def _training(stage: str, run: Path, before: Path | None, options: argparse.Namespace) -> list[str]:
    """torchrun's arguments for a stage that starts from the run before it."""
    ranks = ["--nproc-per-node", str(options.ranks)]
    overrides = [
        f"stage={stage}",
        "model=toy",
        "data=toy",
        "hardware=cpu",
        "hardware.threads=1",  # more gain little in so small products, and lose to the loader
        f"data.root={options.out / 'world'}",
        f"run.dir={run}",
        "trainer.console_every=50",
        f"data.global_batch={BATCH}",
        f"data.micro_batch={BATCH // options.ranks}",
        f"data.samples={_samples(stage, options.scale)}",
        *([f"init_from={before}"] if before else []),
        *options.overrides,
    ]
    return preloaded.torchrun(ranks, REPO / "launch/train.py", overrides)


def _samples(stage: str, scale: float) -> int:
    """`scale` times what the stage's recipe trains on, a step's at least."""
    recipe = yaml.safe_load((REPO / f"conf/recipe/toy_{stage}.yaml").read_text())
    return max(BATCH, round(recipe["data"]["samples"] * scale))


class _Times:
    """Runs the parts of the demo and keeps how long each took, over interruptions too."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, name: str, module: str, *arguments: str) -> None:
        if name in self.seconds:
            return
        print(f"--- {name}", flush=True)
        started = time.perf_counter()
        preloaded.run(module, *arguments)
        self.seconds[name] = round(time.perf_counter() - started, 1)
        self.path.write_text(json.dumps(self.seconds, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
